"""Memory without samples into which a model writes samples.

A model may make a tensor (`torch.zeros`, a clone of a learned state, a view of a buffer), and write
what it computes into it: `h[:, t] = x`, `out.index_add_(0, index, x)`. Such memory has no samples,
so `vmap` cannot write them. From the first of these writes on, it exists once per sample.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ewc import _vmap

_OPERATORS = {
    f"__i{name}__"
    for name in ("add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub")
} | {"__itruediv__", "__ixor__", "__setitem__"}

_RESHAPES = {
    *("as_strided_", "detach_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_"),
    *("swapdims_", "t_", "transpose_", "unsqueeze_"),
}
"""Methods that change a tensor, and not what it holds."""


@dataclass(frozen=True)
class _Block:
    """One block of memory.

    Attributes:
        base: The tensor that the model made; it keeps the memory alive.
        flat: All of the memory, once per sample, `[N, elements]`.
    """

    base: Tensor
    flat: Tensor

    def at(self, tensor: Tensor) -> Tensor:
        """What is in the place of a tensor without samples, `[N, *shape]`.

        Raises:
            RuntimeError: It is not known how autograd connects the tensor with the memory.
        """
        flat = self.flat
        if tensor is not self.base and not (tensor._is_view() and tensor._base is self.base):
            if tensor.requires_grad:
                raise RuntimeError("the model writes into the memory of a detached tensor")
            flat = flat.detach()
        if tensor.dtype != flat.dtype:
            raise RuntimeError("the model writes into a tensor that it sees as another dtype")
        strides = (flat.stride(0), *tensor.stride())
        return flat.as_strided((len(flat), *tensor.shape), strides, tensor.storage_offset())


class Memory:
    """All memory of one forward pass that has become one per sample.

    The tensors without samples that lie in it are out of date then. They are replaced wherever the
    model uses them, views too, so the model sees its writes in all of them.

    Args:
        samples: N.

    Attributes:
        blocks: The memory, by the address of what it replaces.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.blocks: dict[int, _Block] = {}

    def holds(self, tensor: object) -> bool:
        """Whether a tensor lies in such memory."""
        return isinstance(tensor, Tensor) and address(tensor) in self.blocks

    def current(self, tree: Any, level: int) -> Any:
        """Arguments or outputs, each tensor in such memory replaced by what has its place.

        Args:
            tree: The arguments.
            level: The nesting level of the `vmap`.
        """

        def replace(tensor: Tensor) -> Tensor:
            block = self.blocks.get(address(_vmap.inner(tensor, 0)))
            if block is None:
                return tensor
            if _vmap.is_wrapped(tensor) or _vmap.level() != level:
                raise RuntimeError("a transform inside the model uses memory that it has written")
            with _vmap.beneath():
                return _vmap.logical(block.at(tensor), level)

        return tree_map_only(Tensor, replace, tree)

    def divide(self, target: Tensor, copies: Callable[[Tensor], Tensor | None]) -> None:
        """Make the memory of a tensor one per sample; to be called beneath the `vmap`.

        Args:
            target: The tensor that is written to.
            copies: Gives the copies per sample of an effective weight; None for other tensors.

        Raises:
            RuntimeError: It is a parameter.
        """
        base = target._base if target._is_view() else target
        assert base is not None
        if base.requires_grad and base.is_leaf:
            raise RuntimeError("the model writes samples into a parameter")
        storage = base.untyped_storage()
        elements = storage.nbytes() // base.element_size()
        whole = base.detach().as_strided((elements,), (1,), 0)
        block = _Block(base, whole.expand(self._samples, elements).clone())
        if base.requires_grad:
            own = copies(base)
            if own is not None:
                block.at(base).copy_(own)
        self.blocks[storage.data_ptr()] = block


def written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a call writes to: a tensor, several tensors, or None."""
    if "out" in kwargs:
        return kwargs["out"]
    return args[0] if args and writes(func) else None


def has_samples(tree: Any) -> bool:
    """Whether a tensor among the arguments of a call has samples."""
    return any(isinstance(each, Tensor) and _vmap.is_batched(each) for each in tree_leaves(tree))


@cache
def reshapes(func: Callable[..., Any]) -> bool:
    """Whether a method changes the shape of a tensor in place, or how autograd follows it."""
    return getattr(func, "__name__", "") in _RESHAPES


@cache
def writes(func: Callable[..., Any]) -> bool:
    """Whether a function writes to its first argument."""
    name = getattr(func, "__name__", "")
    if name in _OPERATORS:
        return True
    return name.endswith("_") and not name.endswith("__") and name not in _RESHAPES


def address(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; 0 if it has none of its own."""
    if _vmap.is_wrapped(tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a subclass without memory of its own
        return 0
