"""The processes that consolidate together: barriers, agreement, and failures that all report.

Each process runs over its own share of the data. No process may wait in a collective for one that
has failed. So a barrier precedes every exchange, and a process that fails takes part in one last
barrier, whichever the others have reached. There is no way to fail between a barrier and the end of
the exchange behind it: what may be refused is looked at before, and Ctrl-C is held back meanwhile.
"""

import pickle
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ewc.processes.interrupts import Interrupts
from ewc.processes.layout import Groups, local, mesh_groups
from ewc.processes.reductions import communication_device, max_over
from ewc.processes.reports import Reports

Value = TypeVar("Value")

PATIENCE = 0.5
"""For how many seconds a process that was interrupted waits for the others before it leaves."""

_FIRST_PAUSE, _LONGEST_PAUSE, _GROWTH = 2e-5, 2e-3, 1.2
"""Seconds between two looks whether all have arrived: a fixed share of the time waited so far."""


class PeerFailure(BaseException):
    """The processes cannot go on together. `Ranks.all_or_none` raises the right error for it.

    Not an `Exception`: no model, and no fallback to a slower method, may catch it as an error of
    its own.
    """


class Ranks:
    """The processes that consolidate together; a single one if there are no groups.

    Args:
        data: Process groups over which the data is sharded, one for each dimension of the mesh.
        same_data: Further groups, whose processes run on the same data (tensor parallelism).
        device: Where the parameters are; what is exchanged lies there if the groups can send it.
    """

    def __init__(
        self, data: Groups = (), same_data: Groups = (), device: torch.device | str = "cpu"
    ) -> None:
        self._data = tuple(group for group in data if dist.get_world_size(group) > 1)
        self._all = (*self._data, *(g for g in same_data if dist.get_world_size(g) > 1))
        self._device = communication_device(device, self._all)
        self._interrupts = Interrupts()
        self._reports: Reports | None = None
        self._has_reported = False
        self._is_over = False  # whether no other process waits for a report of this one

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one process."""
        return bool(self._all)

    @property
    def data_world_size(self) -> int:
        """The number of processes that the data is sharded over."""
        size = 1
        for group in self._data:
            size *= dist.get_world_size(group)
        return size

    @property
    def data_rank(self) -> int:
        """The rank of this process among those that the data is sharded over."""
        rank = 0
        for group in self._data:
            rank = rank * dist.get_world_size(group) + dist.get_rank(group)
        return rank

    def shards_data_over(self, group: Any) -> bool:
        """Whether the data is sharded over the processes of `group`."""
        ranks = dist.get_process_group_ranks(group)
        return any(dist.get_process_group_ranks(each) == ranks for each in self._data)

    def quota(self, samples: int) -> int:
        """How many of `samples` samples this process takes."""
        size = self.data_world_size
        return samples // size + int(self.data_rank < samples % size)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """The block succeeds on every process, or raises on every one.

        What it changes, it must change after `finish`, which lets no process go on alone.

        Raises:
            KeyboardInterrupt: This process or another one was interrupted.
            RuntimeError: Another process has failed (its error is quoted), or the processes have
                reached different barriers.
        """
        if not self.is_distributed:
            yield
            return
        self._reports, self._has_reported, self._is_over = Reports(self._all), False, False
        self._interrupts.install()
        try:
            yield
        except PeerFailure as failure:
            raise self._raised_for(failure) from failure.__cause__
        except BaseException as error:
            self._announce(error)
            raise
        finally:
            self._interrupts.remove()

    @contextmanager
    def exchange(self, step: str, flag: bool = False) -> Iterator[bool]:
        """A barrier, and what the processes exchange behind it, in which none may fail.

        Args:
            step: What is exchanged, the same on all processes.
            flag: What this process contributes to the result.

        Yields:
            Whether any process has set the flag.

        Raises:
            KeyboardInterrupt: This process was interrupted.
            PeerFailure: A process has failed, or is at another step.
        """
        if not self.is_distributed:
            yield flag
            return
        with self._interrupts.held():
            try:
                yield self._arrive(step, flag)
            except Exception as error:  # a connection is lost: there is no one to report it to
                self._is_over = True
                raise PeerFailure(
                    f"All processes must stay connected; found that they failed to exchange {step} "
                    f"({type(error).__name__}: {error}). Nothing was changed on this one."
                ) from error

    def barrier(self, step: str, flag: bool = False) -> bool:
        """An exchange of a flag alone: whether any process has set it."""
        with self.exchange(step, flag) as any_flag:
            return any_flag

    def agree_on_error(self, error: Exception) -> None:
        """Go on only if all processes have met an error at the same place.

        Raises:
            Exception: `error`, if others have not met one.
        """
        try:
            self.barrier("what to do after an error")
        except PeerFailure:
            self._report(error)
            raise error from None

    def finish(self, undo: list[Any] | None = None) -> None:
        """The last barrier of `all_or_none`: behind it, nothing may fail on any process.

        Ctrl-C is held back until the end of the block.

        Args:
            undo: What this process would undo if it failed alone; emptied if there are others.
        """
        if self.is_distributed:
            self._interrupts.raise_held()
            self._interrupts.hold()
            self._arrive("the end", False)
            self._is_over = True
            if undo is not None:
                undo.clear()

    def look_for_failures(self) -> None:
        """Fail if another process is known to have failed. Not a collective, unless one has.

        Raises:
            PeerFailure: It has.
        """
        if self._reports is not None and self._reports.are_known():
            self.barrier("a failure")

    def gather(self, step: str, value: Value) -> list[Value]:
        """The value of every process. An exchange of its own.

        Raises:
            Exception: `value` cannot be pickled.
        """
        if not self.is_distributed:
            return [value]
        pickle.dumps(value)  # what cannot be sent fails here, before the others are met
        values = [value]
        with self.exchange(step):
            for group in self._all:
                parts: list[Any] = [None] * dist.get_world_size(group)
                dist.all_gather_object(parts, values, group=group)
                values = [each for part in parts for each in part]
        return values

    def first(self, step: str, value: Value | None) -> Value | None:
        """The value of the first process whose value is not None. An exchange of its own."""
        rank = dist.get_rank() if self.is_distributed else 0
        having = self.gather(f"who has {step}", (rank, value is not None))
        owner = next((one for one, has_value in having if has_value), None)
        sent = self.gather(step, value if rank == owner else None)
        return next((one for one in sent if one is not None), None)

    # Collectives, for use inside an exchange.

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over the processes that the data is sharded over, in place.

        A sharded tensor must be summed over the groups of its own mesh already: its local parts
        are summed over the other groups.
        """
        tensors = list(tensors)
        for group in self._data:
            ranks = dist.get_process_group_ranks(group)
            parts = [
                local(each)
                for each in tensors
                if all(dist.get_process_group_ranks(one) != ranks for one in mesh_groups([each]))
            ]
            works = [dist.all_reduce(each, group=group, async_op=True) for each in parts]
            for work in works:
                assert work is not None
                work.wait()

    def sum(self, number: int) -> int:
        """The sum of a number over the processes that the data is sharded over."""
        tensor = torch.tensor(number, device=self._device)
        self.all_reduce([tensor])
        return int(tensor)

    def maximum(self, values: Tensor) -> Tensor:
        """The elementwise maximum over all processes."""
        return max_over(values, self._all)

    def _arrive(self, step: str, flag: bool) -> bool:
        """Wait for all processes, with Ctrl-C held back; whether any process has set the flag."""
        assert self._reports is not None  # exchanges belong into `all_or_none`
        code = zlib.crc32(step.encode())
        is_known = self._reports.are_known()
        failed, highest, negated_lowest, any_flag = self._meet([is_known, code, -code, flag])
        self._is_over = bool(failed) or highest != -negated_lowest  # all processes know it
        if failed:
            raise PeerFailure
        if self._is_over:
            raise PeerFailure(
                "All processes must run the model in the same way; found that they differ (this "
                f"one, rank {dist.get_rank()}, has reached: {step}). Fix: use the same modules of "
                "a model with sharded parameters for all samples, as training requires."
            )
        return bool(any_flag)

    def _meet(self, numbers: list[int]) -> list[int]:
        """The elementwise maximum over all processes.

        Raises:
            KeyboardInterrupt: This process was interrupted, and others did not arrive in time.
            PeerFailure: Another one was.
        """
        values = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        for group in self._all:
            # Not waited for in C++, where Python cannot handle signals.
            work: Any = dist.all_reduce(values, dist.ReduceOp.MAX, group=group, async_op=True)
            if not self._is_over and not self._wait(work):
                # Whoever arrives later must find all that this process owes to the barrier.
                self._is_over = True
                values = torch.tensor([1, 0, 0, 0], device=self._device)
        if self._is_over and self._interrupts.since is None:
            raise PeerFailure
        if self._is_over:
            raise KeyboardInterrupt("interrupted while it waited for other processes")
        found: list[int] = values.tolist()
        return found

    def _wait(self, work: Any) -> bool:
        """Wait for a collective; whether it has ended before this process leaves.

        It leaves if it was interrupted, or if another one was, which may have left already.
        """
        started, pause = time.monotonic(), _FIRST_PAUSE
        heard: float | None = None
        while not work.is_completed():
            if self._interrupts.since is not None:
                self._report(KeyboardInterrupt())  # others may hear of it before they arrive
                if time.monotonic() - max(started, self._interrupts.since) > PATIENCE:
                    return False
            elif heard is not None:
                if time.monotonic() - heard > 2 * PATIENCE:
                    return False
            elif self._reports is not None and self._reports.tell_of_an_interrupt():
                heard = time.monotonic()
            time.sleep(pause)
            pause = min(_GROWTH * pause, _LONGEST_PAUSE)
        work.wait()
        return True

    def _announce(self, error: BaseException) -> None:
        """Report this process's own error, also at the barrier that the others reach next."""
        self._interrupts.hold()
        if not self._is_over:
            self._report(error)
            # The connection may be gone, or others may not come; `error` is what must be raised.
            with suppress(Exception, KeyboardInterrupt):
                self._meet([1, 0, 0, 0])

    def _report(self, error: BaseException) -> None:
        if self._has_reported or self._reports is None:
            return
        self._has_reported = True
        kind = "KeyboardInterrupt" if isinstance(error, KeyboardInterrupt) else type(error).__name__
        with suppress(Exception):  # the process with the store may be gone
            self._reports.add(f"rank {dist.get_rank()}: {kind}: {error}")

    def _raised_for(self, failure: PeerFailure) -> BaseException:
        """The error that this process raises for a failure that is not its own."""
        assert self._reports is not None
        found = self._reports.read()
        if failure.args and not found:
            return RuntimeError(*failure.args)
        found = found or ["unknown; see the errors of the other processes"]
        message = (
            "All processes must finish; found a failure, and nothing was changed on any of them:\n"
            + "\n".join(f"  - {each}" for each in found)
        )
        is_interrupt = any(each.split(": ")[1:2] == ["KeyboardInterrupt"] for each in found)
        return KeyboardInterrupt(message) if is_interrupt else RuntimeError(message)


SINGLE_PROCESS = Ranks()
"""This process by itself, whether or not `torch.distributed` is initialised."""
