"""Processes that run the cases of the tests together, started once for all of them."""

import queue
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from tests.support.versions import SHARDS

REFUSAL = "PyTorch must be 2.12 or later for sharded parameters"
LIMIT = 120  # seconds; no case takes more than a few


class GlooError(AssertionError):
    """PyTorch's transport has failed: the case is run once more.

    Two faults were seen, both rare and on a busy machine:

    - A thread never ends: after a gather it waits in the destructor of a buffer. Two processes that
      alternate `all_reduce` and `DTensor.full_tensor`, without this library, hang in the same way
      on PyTorch 2.13, after some ten thousand gathers.
    - A signal ends a process: once malloc found its memory overwritten, during a reduction of gloo.
      Neither this library nor its tests have code that is not Python.
    """


class Workers:
    """`world` processes over gloo that wait for cases, functions of `(rank, world, *arguments)`."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._inboxes = [context.Queue() for _ in range(self.world)]
        self._outbox = context.Queue()
        store = str(Path(self._folder.name) / "store")
        self._processes = [
            context.Process(
                target=_work, args=(rank, self.world, store, inbox, self._outbox), daemon=True
            )
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def run(self, case: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a case on all; returns what each returned, or raises what the first raised.

        If one does not answer in time, or dies, all are stopped, and the case fails. After a known
        fault of gloo it is run once more.
        """
        try:
            return self._run(case, *arguments)
        except GlooError:
            return self._run(case, *arguments)

    def _run(self, case: Callable[..., Any], *arguments: Any) -> list[Any]:
        for inbox in self._inboxes:
            inbox.put((case, arguments))
        answers: dict[int, tuple[Any, str]] = {}
        while len(answers) < self.world:
            try:
                rank, value, failure = self._answer()
            except queue.Empty:
                missing = sorted(set(range(self.world)) - set(answers))
                told = "\n".join(failure for _, failure in answers.values() if failure)
                codes = [process.exitcode for process in self._processes]
                was_killed = any(code is not None and code < 0 for code in codes)
                is_known = was_killed or any(map(_gloo_spins, self._processes))
                self.stop()
                self._start()
                kind = GlooError if is_known else AssertionError
                found = f"no answer from ranks {missing}, exit codes {codes}: hung?\n{told}"
                raise kind(found) from None
            answers[rank] = value, failure
        failures = [failure for _, failure in answers.values() if failure]
        if not SHARDS and any(REFUSAL in each for each in failures):
            pytest.skip(REFUSAL)
        if failures:
            raise AssertionError("\n".join(failures))
        return [answers[rank][0] for rank in range(self.world)]

    def _answer(self) -> Any:
        """The next answer.

        Raises:
            queue.Empty: There is none in time, or a process is dead.
        """
        end = time.monotonic() + LIMIT
        while True:
            try:
                return self._outbox.get(timeout=2)
            except queue.Empty:
                is_dead = any(process.exitcode is not None for process in self._processes)
                if is_dead or time.monotonic() > end:
                    raise

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _gloo_spins(process: Any) -> bool:
    """Whether a thread of gloo is busy in a process that does not answer; it should be waiting."""
    tasks = Path(f"/proc/{process.pid}/task")

    def used() -> list[int]:
        """The ticks of the processor that each thread of gloo has used."""
        stats = [
            (task / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
            for task in sorted(tasks.glob("*"))
            if (task / "comm").read_text(encoding="ascii").strip() == "pt_gloo_runloop"
        ]
        return [int(stat[11]) + int(stat[12]) for stat in stats]

    before = used()
    time.sleep(3)
    return any(after > then for then, after in zip(before, used(), strict=True))


def _work(rank: int, world: int, store: str, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    # A shell that runs the tests in the background has Ctrl-C ignored in them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=world,
        init_method=f"file://{store}",
        timeout=timedelta(seconds=LIMIT),
    )
    while True:
        case, arguments = inbox.get()
        try:
            outbox.put((rank, case(rank, world, *arguments), ""))
        except BaseException:
            outbox.put((rank, None, f"--- rank {rank}\n{traceback.format_exc()}"))
