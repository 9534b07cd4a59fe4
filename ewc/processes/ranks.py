"""The only collectives: what several processes tell each other during a consolidation.

Each process runs over its own share of the data. What must never happen is that one of them waits
for another that has failed, so before anything is exchanged all meet, and a process that has
failed says so at the next meeting, whichever that is for the others.
"""

import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ewc.processes.layout import Groups, data_mesh, is_sharded, mesh_groups

Value = TypeVar("Value")


class Parted(BaseException):
    """All processes know that they cannot go on together. Never shown to users.

    Not an `Exception`: no model, and no fallback of ours, may take it for a failure of its own.
    """


class Ranks:
    """The processes that consolidate together; one alone, if there are no groups.

    Args:
        data: Groups over which the data is sharded; their sizes multiply.
        beside: Further groups that work on the same data together (tensor parallel).
        device: Where what is exchanged lies.
    """

    def __init__(
        self, data: Groups = (), beside: Groups = (), device: torch.device | str = "cpu"
    ) -> None:
        self._data = tuple(group for group in data if dist.get_world_size(group) > 1)
        self._all = (*self._data, *(g for g in beside if dist.get_world_size(g) > 1))
        self._device = _reachable(device, self._all)

    @property
    def together(self) -> bool:
        """Whether there is more than one process."""
        return bool(self._all)

    @property
    def sharing(self) -> int:
        """How many processes share the data."""
        count = 1
        for group in self._data:
            count *= dist.get_world_size(group)
        return count

    @property
    def data_rank(self) -> int:
        """The place of this process among those that share the data."""
        place = 0
        for group in self._data:
            place = place * dist.get_world_size(group) + dist.get_rank(group)
        return place

    def shards_data_over(self, group: Any) -> bool:
        """Whether the data is sharded over the ranks of a group."""
        ranks = dist.get_process_group_ranks(group)
        return any(dist.get_process_group_ranks(each) == ranks for each in self._data)

    def quota(self, samples: int) -> int:
        """How many of so many samples are this process's."""
        return samples // self.sharing + int(self.data_rank < samples % self.sharing)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """What happens inside succeeds on every process, or raises on every one.

        The last thing inside is to be a meeting, at which a late failure elsewhere is heard of.

        Raises:
            RuntimeError: Another process has failed, with what it says; or the processes have
                taken different ways.
        """
        if not self.together:
            yield
            return
        try:
            yield
        except Parted as parted:
            raise RuntimeError(str(parted)) from None
        except BaseException as error:
            self._tell(error)
            raise

    def barrier(self, where: str, flag: bool = False) -> bool:
        """Wait until all processes are here, and say whether any of them has raised the flag.

        Args:
            where: What is to happen next, the same on all processes.
            flag: Something to tell the others.

        Raises:
            Parted: One has failed, or is elsewhere.
        """
        if not self.together:
            return flag
        place = zlib.crc32(where.encode())
        failed, most, least, raised = self._highest([0, place, -place, int(flag)])
        if failed:
            raise Parted(self._told(None))
        if most != -least:
            raise Parted(
                "expected all processes to run the model in the same way; found that they differ "
                f"(this one, rank {dist.get_rank()}, has come to: {where}). A model with sharded "
                "parameters must use the same modules for all samples, as for training"
            )
        return bool(raised)

    def agree(self, what: Mapping[str, Any]) -> None:
        """Check that all processes have the same values.

        Raises:
            ValueError: They differ; all that differs is listed.
        """
        if not self.together:
            return
        self.barrier("agreement")
        everyone = self.all_gather((dist.get_rank(), dict(what)))
        problems = []
        for key in dict.fromkeys(key for _, values in everyone for key in values):
            found: dict[str, list[int]] = {}
            for rank, values in everyone:
                found.setdefault(repr(values.get(key)), []).append(rank)
            if len(found) > 1:
                shown = "; ".join(f"{value} on {_listed(ranks)}" for value, ranks in found.items())
                problems.append(f"{key}: {shown}")
        if problems:
            raise ValueError(
                "expected the same object on every process; found that they differ in\n"
                + "\n".join(f"  - {problem}" for problem in problems)
                + "\nBuild model and EWC in the same way on all of them"
            )

    def all_gather(self, value: Value) -> list[Value]:
        """The value of every process. They must have met."""
        values = [value]
        for group in self._all:
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, values, group=group)
            values = [each for part in parts for each in part]
        return values

    def first(self, value: Value | None) -> Value | None:
        """The value of the first process that has one. They must have met."""
        rank = dist.get_rank() if self.together else 0
        having = [one for one, has in self.all_gather((rank, value is not None)) if has]
        if not having:
            return None
        sent = self.all_gather(value if rank == having[0] else None)
        return next(one for one in sent if one is not None)

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over all that share the data, in place. They must have met."""
        tensors = list(tensors)
        for group in self._data:
            works = [dist.all_reduce(each, group=group, async_op=True) for each in tensors]
            for work in works:
                assert work is not None
                work.wait()

    def sum(self, number: int) -> int:
        """The sum of a number over all that share the data. They must have met."""
        total = torch.tensor(number, device=self._device)
        self.all_reduce([total])
        return int(total)

    def maximum(self, values: Tensor) -> Tensor:
        """The largest value on any process, entry by entry. They must have met."""
        return maximum(values, self._all)

    def _highest(self, numbers: list[int]) -> list[int]:
        values = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        found: list[int] = maximum(values, self._all).tolist()
        return found

    def _tell(self, error: BaseException) -> None:
        """Let the others know, wherever they meet next. `error` is this process's own."""
        with suppress(Exception):  # the connection may be gone; `error` is what is to be raised
            self._highest([1, 0, 0, 0])
            self._told(error)

    def _told(self, error: BaseException | None) -> str:
        """What failed where, once all know that something did."""
        own = None if error is None else f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        failures = [each for each in self.all_gather(own) if each is not None]
        return (
            "expected every process to finish; found a failure elsewhere, and nothing was changed "
            "on any of them. " + "\n".join(failures)
        )


def maximum(values: Tensor, groups: Groups) -> Tensor:
    """The largest values over these groups, entry by entry; `values` itself if there are none."""
    return _reduced(values, groups, dist.ReduceOp.MAX)


def total(values: Tensor, groups: Groups) -> Tensor:
    """The sum over these groups, entry by entry; `values` itself if there are none."""
    return _reduced(values, groups, dist.ReduceOp.SUM)


def _reduced(values: Tensor, groups: Groups, by: Any) -> Tensor:
    if not groups:
        return values
    home = values.device
    values = values.to(_reachable(home, groups), copy=True)
    for group in groups:
        dist.all_reduce(values, by, group=group)
    return values.to(home)


class _Summed(torch.autograd.Function):
    """A sum over processes. What each of them adds gets the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, groups: Groups) -> Tensor:
        return total(value, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def summed(value: Tensor, groups: Groups) -> Tensor:
    """The sum over these groups, differentiable; `value` itself if there are none.

    Every process is to go backward from the same function of the sum. Then the gradient of what
    it has added is that of the sum, and nothing needs to be exchanged on the way back.
    """
    if not groups:
        return value
    result: Tensor = _Summed.apply(value, groups)  # type: ignore[no-untyped-call]
    return result


def leads(groups: Groups) -> bool:
    """Whether this process is the one that adds what is to be added once over these groups."""
    return all(dist.get_rank(group) == 0 for group in groups)


def ranks_of(model: nn.Module, process_group: Any) -> Ranks:
    """The processes that consolidate a model together.

    Args:
        model: The unwrapped model.
        process_group: The user's, or the wrapper's; None for the mesh of `fully_shard`, else the
            world, if it is initialised.

    Raises:
        ValueError: The group does not go with the way the parameters are sharded.
    """
    if not dist.is_available() or not dist.is_initialized():
        return SINGLE_PROCESS
    parameters = list(model.parameters())
    device = next((p.device for p in parameters), torch.device("cpu"))
    sharded = [p for p in parameters if is_sharded(p)]
    meshes = mesh_groups(sharded)
    mesh = data_mesh(model)
    data: Groups
    if mesh is not None:
        data = tuple(mesh.get_group(dim) for dim in range(mesh.ndim))
        if process_group is not None:
            data = _checked(process_group, data, mesh)
    elif process_group is not None:
        data = (process_group,)
    elif not sharded:
        data = (dist.group.WORLD,)
    elif len(sharded[0].device_mesh.mesh.flatten()) == dist.get_world_size():  # type: ignore[attr-defined]
        data = ()  # all work on the same data
    else:
        raise ValueError(
            "expected to know which processes share the data; found tensor-parallel parameters on "
            "a part of the world. Pass process_group: the group over which batches are sharded "
            "(mesh['dp'].get_group()), or one of a single rank if they are not"
        )
    known = {tuple(dist.get_process_group_ranks(group)) for group in data}
    beside = [g for g in meshes if tuple(dist.get_process_group_ranks(g)) not in known]
    return Ranks(data, tuple(beside), device)


def _checked(given: Any, data: Groups, mesh: Any) -> Groups:
    """The data's groups, if the user's is the same or a single rank, which opts out."""
    ranks = dist.get_process_group_ranks(given)
    if len(ranks) == 1:
        return ()
    if sorted(ranks) == sorted(mesh.mesh.flatten().tolist()):
        return data
    raise ValueError(
        "process_group must be the mesh that fully_shard shards over, ranks "
        f"{sorted(mesh.mesh.flatten().tolist())}, or a single rank; found ranks {sorted(ranks)}. "
        "Leave it out"
    )


def wrapper_group(model: nn.Module) -> Any:
    """The process group of a `DistributedDataParallel` around or inside a model, if any."""
    home = sys.modules.get("torch.nn.parallel.distributed")
    kind = getattr(home, "DistributedDataParallel", None)
    wrappers = (m for m in model.modules() if kind is not None and isinstance(m, kind))
    return next((wrapper.process_group for wrapper in wrappers), None)


def _reachable(device: torch.device | str, groups: Groups) -> torch.device:
    """`device`, or one that all of these groups can send from."""
    device = torch.device(device)
    for group in groups:
        backends = dist.get_backend_config(group)
        kinds = [pair.partition(":")[0] for pair in backends.split(",")]
        if device.type not in kinds:
            return torch.device(kinds[-1], torch.accelerator.current_device_index())
    return device


def _listed(ranks: list[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {', '.join(map(str, sorted(ranks)))}"


SINGLE_PROCESS = Ranks()
"""One process, whatever else there is."""
