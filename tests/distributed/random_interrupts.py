"""Interrupts several processes at random moments of a consolidation, many times.

    python -m tests.distributed.random_interrupts --times 200 --world 2

Prints how often a consolidation was interrupted everywhere, or ended everywhere; how long it took
from the signal to the end; and, as an error, everything else. Not run by the tests: it takes
minutes. `test_interrupts.py` has the moments that can be chosen.
"""

import argparse
import collections
import faulthandler
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import multiprocessing

from ewc.processes.interrupts import Interrupts
from tests.distributed.test_interrupts import Case

LATEST = 0.4  # seconds from the beginning of a consolidation to the signal, at most


def run(rank: int, world: int, store: str, times: int, sharded: bool, seed: int) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, init_method=f"file://{store}", timeout=limit
    )
    case = Case(rank, world, sharded)
    case.consolidated()
    draws = random.Random(seed)  # the same on all processes
    counts: collections.Counter[str] = collections.Counter()
    longest = 0.0
    for _ in range(times):
        guilty = draws.choice([list(range(world)), [draws.randrange(world)]])
        delays = [draws.uniform(0, LATEST) if len(guilty) == 1 else None for _ in range(world)]
        together = draws.uniform(0, LATEST)
        pauses = [draws.choice([0.0, 0.0, 0.01]) for _ in range(world)]
        faulthandler.dump_traceback_later(40, exit=True)
        dist.barrier()
        found, took = interrupted(case, delays[rank] or together, rank in guilty, pauses[rank])
        longest = max(longest, took)
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, found)
        counts[" / ".join(sorted(set(everyone)))] += 1
        faulthandler.cancel_dump_traceback_later()
    case.check()
    slowest: list[Any] = [None] * world
    dist.all_gather_object(slowest, longest)
    if rank == 0:
        print(f"{'sharded' if sharded else 'whole'}, {world} processes: {dict(counts)}")
        print(f"from the signal to the end: at most {max(slowest):.2f} s", flush=True)
    dist.destroy_process_group()


def interrupted(case: Case, delay: float, is_guilty: bool, pause: float) -> tuple[str, float]:
    """What became of a consolidation, and how long after the signal."""

    def batches() -> Iterator[Any]:
        for batch in case.batches * 10:
            time.sleep(pause)
            yield batch

    sent = threading.Event()

    def send() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        sent.set()

    timer = threading.Timer(delay, send)
    install, started = Interrupts.install, time.monotonic()

    def begin(interrupts: Interrupts) -> None:
        nonlocal started
        install(interrupts)
        started = time.monotonic()
        if is_guilty:  # not before: the others would wait for a process that never comes
            timer.start()

    tasks = case.ewc.n_tasks
    try:
        with patch.object(Interrupts, "install", begin):
            case.consolidated(batches())
    except KeyboardInterrupt:
        pass  # outside of the consolidation
    ended = time.monotonic()
    while is_guilty and not sent.is_set():
        with suppress(KeyboardInterrupt):  # it comes only now
            sent.wait()
            time.sleep(0.01)
    found = "interrupted" if case.ewc.n_tasks == tasks else "committed"
    return found, max(0.0, ended - started - delay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["whole", "sharded"])
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for sharded in (False, True):
        if options.only and sharded != (options.only == "sharded"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            arguments = (options.world, store, options.times, sharded, options.seed)
            processes = [
                context.Process(target=run, args=(rank, *arguments))
                for rank in range(options.world)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()


if __name__ == "__main__":
    main()
