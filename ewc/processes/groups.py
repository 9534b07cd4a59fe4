"""Which processes consolidate a model together: the group of DDP, of a mesh, or of the user."""

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ewc.processes.layout import Groups, data_mesh, distributed_parameters, mesh_groups
from ewc.processes.ranks import SINGLE_PROCESS, Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def ranks_of(model: nn.Module, process_group: "ProcessGroup | None") -> Ranks:
    """The processes that consolidate a model together.

    Args:
        model: The unwrapped model.
        process_group: The user's group, or that of the wrapper. None for the mesh of
            `fully_shard`, else the world, if `torch.distributed` is initialised.

    Raises:
        ValueError: The group does not fit the way in which the parameters are sharded.
    """
    if not dist.is_available() or not dist.is_initialized():
        return SINGLE_PROCESS
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sharded = distributed_parameters(model)
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
        data = ()  # tensor parallelism over the whole world: all processes have the same data
    else:
        raise ValueError(
            "The processes that share the data must be known; found tensor-parallel parameters on "
            "a part of the world, and no process_group. Fix: pass process_group, the group over "
            "which batches are sharded (mesh['dp'].get_group()), or one of a single rank if they "
            "are not sharded."
        )
    data_ranks = {tuple(dist.get_process_group_ranks(group)) for group in data}
    same_data = tuple(
        group
        for group in mesh_groups(sharded)
        if tuple(dist.get_process_group_ranks(group)) not in data_ranks
    )
    return Ranks(data, same_data, device)


def ranks_of_shards(model: nn.Module) -> Ranks:
    """The processes that a model's parameters are sharded over; a single one if none are."""
    sharded = distributed_parameters(model)
    if not sharded:
        return SINGLE_PROCESS
    return Ranks(same_data=tuple(mesh_groups(sharded)), device=sharded[0].device)


def wrapper_group(model: nn.Module) -> "ProcessGroup | None":
    """The process group of a `DistributedDataParallel` around or inside a model, if any."""
    module = sys.modules.get("torch.nn.parallel.distributed")
    kind = getattr(module, "DistributedDataParallel", None)
    wrappers: list[Any] = [m for m in model.modules() if kind is not None and isinstance(m, kind)]
    return next((wrapper.process_group for wrapper in wrappers), None)


def _checked(process_group: "ProcessGroup", data: Groups, mesh: Any) -> Groups:
    """`data`, if the user's group has the mesh's ranks; no group, if it has a single rank."""
    ranks = dist.get_process_group_ranks(process_group)
    if len(ranks) == 1:
        return ()
    expected = sorted(mesh.mesh.flatten().tolist())
    if sorted(ranks) == expected:
        return data
    raise ValueError(
        f"process_group must have the ranks of the mesh of fully_shard, {expected}, or a single "
        f"one; found ranks {sorted(ranks)}. Fix: leave process_group out."
    )
