"""How sharded parameters are laid out: the questions that the library asks of a `DTensor`.

`fully_shard` and `parallelize_module` turn parameters into `DTensor`s, of which each process holds
a part. Fisher and anchor are laid out in the same way. Nothing of `torch.distributed.tensor` or
`torch.distributed.fsdp` is imported before a model uses it.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SHARDING = (2, 12)  # the first version of PyTorch on which sharded parameters are supported

Groups = tuple[Any, ...]
"""Process groups, one for each dimension of a mesh: reductions go over one after the other."""


def is_sharded(tensor: object) -> bool:
    """Whether `tensor` is a `DTensor`: each process may hold another part of it.

    Raises:
        RuntimeError: It is one, and PyTorch is too old for it.
    """
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if kind is None or not isinstance(tensor, kind):
        return False
    _check_version("a DTensor")
    return True


def refuse_unsupported(tensors: Iterable[Tensor]) -> None:
    """Refuse sharded tensors where PyTorch is too old for them.

    Raises:
        RuntimeError: One is sharded, and PyTorch is too old.
    """
    for tensor in tensors:
        is_sharded(tensor)


def _check_version(found: str) -> None:
    # Before, gradients of a compiled penalty are 0, and under tensor parallelism the Fisher is
    # wrong. A tuple, since the compiler can follow no comparison of versions.
    if tuple(map(int, torch.__version__.split(".")[:2])) < _SHARDING:
        needed = ".".join(map(str, _SHARDING))
        raise RuntimeError(
            f"PyTorch must be {needed} or later for sharded parameters (fully_shard, tensor "
            f"parallelism, DTensor); found {found} with PyTorch {torch.__version__}. Fix: install "
            f"torch>={needed}, or train with DistributedDataParallel, which needs no sharding."
        )


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, differentiable; any other tensor as it is."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every process; any other tensor as it is. A collective."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Whether every process holds the same part of both."""
    if not is_sharded(tensor) or not is_sharded(other):
        return is_sharded(tensor) == is_sharded(other)
    return bool(
        tensor.device_mesh == other.device_mesh  # type: ignore[attr-defined]
        and tensor.placements == other.placements  # type: ignore[attr-defined]
    )


def with_layout_of(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, distributed over processes as `other` is; differentiable.

    A collective if `tensor` is sharded in another way. A tensor that is not sharded must be the
    same on all processes: each keeps its part, and nothing is sent.
    """
    if same_layout(tensor, other):
        return tensor
    tensor = full_tensor(tensor)
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = other.device_mesh  # type: ignore[attr-defined]
    replicated = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, other.placements)  # type: ignore[attr-defined]


def described(tensor: Tensor) -> str:
    """The shape of a tensor, and how it is sharded."""
    if not is_sharded(tensor):
        return f"shape {tuple(tensor.shape)}"
    placements = ", ".join(map(str, tensor.placements))  # type: ignore[attr-defined]
    return f"shape {tuple(tensor.shape)}, sharded by {placements}"


def shard_groups(tensor: Tensor) -> Groups:
    """The groups over which sums of local parts must be reduced to the sum over `tensor`."""
    if not is_sharded(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def mesh_groups(tensors: Iterable[Tensor]) -> list[Any]:
    """The groups of all dimensions of the meshes that these tensors are sharded over.

    In the order of the tensors, the same on all processes: they reduce over one after the other.
    """
    found: dict[tuple[int, ...], Any] = {}
    meshes = (t.device_mesh for t in tensors if is_sharded(t))  # type: ignore[attr-defined]
    for mesh in dict.fromkeys(meshes):  # a set has another order on every process
        for dim in range(mesh.ndim):
            group = mesh.get_group(dim)
            found.setdefault(tuple(torch.distributed.get_process_group_ranks(group)), group)
    return list(found.values())


# Modules that `fully_shard` was applied to.

_SUBSTITUTES = ("_unsharded_param", "_sharded_post_forward_param")
"""The attributes of an FSDP parameter with what modules hold between forward and backward."""


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the module.

    Raises:
        RuntimeError: It was, and PyTorch is too old for it.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None or not isinstance(module, kind):
        return False
    _check_version("fully_shard")
    return True


def fsdp_states(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The modules that `fully_shard` was applied to, each with its FSDP state."""
    for module in model.modules():
        if is_fsdp_module(module):
            yield module, module._get_fsdp_state()  # type: ignore[operator]


def has_sharded_parameters(model: nn.Module) -> bool:
    """Whether parameters of a model are sharded, even if they are unsharded at the moment."""
    return any(map(is_sharded, model.parameters())) or any(True for _ in fsdp_states(model))


def distributed_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The sharded parameters of a model as optimizers know them, even while they are gathered."""
    found: list[nn.Parameter] = []
    substitutes: set[int] = set()
    for _, state in fsdp_states(model):
        for one in (one for group in state._fsdp_param_groups for one in group.fsdp_params):
            found.append(one.sharded_param)
            substitutes.update(id(getattr(one, name, None)) for name in _SUBSTITUTES)
    known = substitutes.union(map(id, found))
    return [*found, *(p for p in model.parameters() if is_sharded(p) and id(p) not in known)]


def data_mesh(model: nn.Module) -> Any:
    """The mesh that `fully_shard` shards parameters and data over; None if it was not applied."""
    for _, state in fsdp_states(model):
        for group in state._fsdp_param_groups:
            return group.mesh_info.mesh
    return None


def sharded_original(module: nn.Module | None, parameter: nn.Parameter) -> nn.Parameter:
    """The sharded parameter that `parameter` replaces between forward and backward.

    There a module holds its parameters unsharded, or sharded over fewer processes
    (`reshard_after_forward` as an integer). Optimizers know the sharded ones, and read their
    gradients.

    Args:
        module: The innermost module around the parameter that `fully_shard` was applied to.
        parameter: The parameter that the module has now.
    """
    if module is None:
        return parameter
    if torch.compiler.is_compiling() and is_sharded(parameter):
        return parameter  # FSDP states are in a dictionary that cannot be traced
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    for group in state._fsdp_param_groups:
        for one in group.fsdp_params:
            if any(getattr(one, name, None) is parameter for name in _SUBSTITUTES):
                sharded: nn.Parameter = one.sharded_param
                return sharded
    return parameter
