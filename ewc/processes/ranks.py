"""The processes that consolidate together: barriers, agreement, and failures that all report.

Each process runs over its own share of the data. No process may wait in a collective for one that
has failed. So a barrier precedes every exchange, and a process that fails takes part in one last
barrier, whichever the others have reached, and reports its error there.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ewc.processes.layout import Groups, local, mesh_groups
from ewc.processes.reductions import communication_device, max_over

Value = TypeVar("Value")


class PeerFailure(BaseException):
    """The processes cannot go on together. `Ranks.all_or_none` turns it into a `RuntimeError`.

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

        It must end with a barrier: otherwise one process could leave it before another fails.

        Raises:
            RuntimeError: Another process has failed (its error is quoted), or the processes have
                reached different barriers.
        """
        if not self.is_distributed:
            yield
            return
        try:
            yield
        except PeerFailure as failure:
            raise RuntimeError(str(failure)) from None
        except BaseException as error:
            self._announce(error)
            raise

    def barrier(self, step: str, flag: bool = False) -> bool:
        """Wait for all processes, and return whether any of them has set the flag.

        Args:
            step: What follows the barrier, the same on all processes.
            flag: What this process contributes to the result.

        Raises:
            PeerFailure: A process has failed, or is at another step.
        """
        if not self.is_distributed:
            return flag
        code = zlib.crc32(step.encode())
        failed, highest, negated_lowest, any_flag = self._maximum_of([0, code, -code, int(flag)])
        if failed:
            raise PeerFailure(self._collect_failures(None))
        if highest != -negated_lowest:
            raise PeerFailure(
                "All processes must run the model in the same way; found that they differ (this "
                f"one, rank {dist.get_rank()}, has reached: {step}). Fix: use the same modules of "
                "a model with sharded parameters for all samples, as training requires."
            )
        return bool(any_flag)

    def agree(self, values: Mapping[str, Any]) -> None:
        """Check that all processes have the same values.

        Raises:
            ValueError: Some differ; all of them are listed.
        """
        if not self.is_distributed:
            return
        self.barrier("agreement")
        everyone = self.all_gather((dist.get_rank(), dict(values)))
        problems = []
        for key in dict.fromkeys(key for _, own in everyone for key in own):
            found: dict[str, list[int]] = {}
            for rank, own in everyone:
                found.setdefault(repr(own.get(key)), []).append(rank)
            if len(found) > 1:
                shown = "; ".join(f"{value} on {_listed(ranks)}" for value, ranks in found.items())
                problems.append(f"{key}: {shown}")
        if problems:
            raise ValueError(
                "Model, object and arguments must be the same on every process; found differences "
                "in\n" + "\n".join(f"  - {problem}" for problem in problems) + "\nFix: build the "
                "model and the object, and call consolidate, in the same way on all processes."
            )

    # Collectives. Each must directly follow a barrier.

    def all_gather(self, value: Value) -> list[Value]:
        """The value of every process."""
        values = [value]
        for group in self._all:
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, values, group=group)
            values = [each for part in parts for each in part]
        return values

    def first(self, value: Value | None) -> Value | None:
        """The value of the first process whose value is not None."""
        rank = dist.get_rank() if self.is_distributed else 0
        owners = [one for one, has_value in self.all_gather((rank, value is not None)) if has_value]
        if not owners:
            return None
        sent = self.all_gather(value if rank == owners[0] else None)
        return next(one for one in sent if one is not None)

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

    def _maximum_of(self, numbers: list[int]) -> list[int]:
        values = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        found: list[int] = self.maximum(values).tolist()
        return found

    def _announce(self, error: BaseException) -> None:
        """Report this process's own error at the barrier that the others reach next."""
        with suppress(Exception):  # the connection may be gone; `error` is what must be raised
            self._maximum_of([1, 0, 0, 0])
            self._collect_failures(error)

    def _collect_failures(self, error: BaseException | None) -> str:
        """The errors of all processes, as the message of a `PeerFailure`."""
        own = None if error is None else f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        failures = [each for each in self.all_gather(own) if each is not None]
        return (
            "All processes must finish; found a failure, and nothing was changed on any of them:\n"
            + "\n".join(f"  - {failure}" for failure in failures)
        )


def _listed(ranks: list[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {', '.join(map(str, sorted(ranks)))}"


SINGLE_PROCESS = Ranks()
"""This process by itself, whether or not `torch.distributed` is initialised."""
