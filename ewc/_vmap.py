"""How `torch.func.vmap` wraps tensors: the only module that uses functorch's internals.

Inside `vmap`, a tensor that has samples is a wrapper around a *physical* tensor with one more
dimension, the samples. Rules and validation need the physical tensor. The documented access to it,
the `vmap` staticmethod of `autograd.Function`, takes about 0.4 ms a call, several times the
arithmetic of a small layer.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue] - no stub has it


def level() -> int:
    """The nesting level of the innermost running `vmap` (or other transform); 0 outside of all."""
    found: int | None = _functorch.maybe_current_level()
    return 0 if found is None else found


@contextmanager
def beneath() -> Iterator[None]:
    """Leave the innermost `vmap` in this context, to compute on physical tensors."""
    saved = _functorch.pop_dynamic_layer_stack()
    try:
        yield
    finally:
        _functorch.push_dynamic_layer_stack(saved)


@contextmanager
def outside() -> Iterator[None]:
    """Leave every running `vmap` in this context."""
    with ExitStack() as stack:
        while level():
            stack.enter_context(beneath())
        yield


def is_batched(tensor: Tensor, at: int | None = None) -> bool:
    """Whether `tensor` has the samples of the `vmap` at nesting level `at`; None: of any `vmap`."""
    batched = bool(_functorch.is_batchedtensor(tensor))
    return batched and (at is None or _functorch.maybe_get_level(tensor) == at)


def physical(tensor: Tensor, at: int) -> Tensor | None:
    """The tensor `[N, *shape]` behind a `tensor` of `[*shape]` that has the samples of a `vmap`.

    Args:
        tensor: A tensor inside the `vmap`.
        at: The nesting level of the `vmap`.

    Returns:
        The samples along dimension 0; None if `tensor` has no samples of this `vmap`.
    """
    if not is_batched(tensor, at):
        return None
    inner: Tensor = _functorch.get_unwrapped(tensor)
    dim: int = _functorch.maybe_get_bdim(tensor)
    return inner.movedim(dim, 0) if dim else inner


def logical(tensor: Tensor, at: int) -> Tensor:
    """The inverse of `physical`: `[N, *shape]` becomes a tensor `[*shape]` inside the `vmap`."""
    wrapped: Tensor = _functorch._add_batch_dim(tensor, 0, at)
    return wrapped


def peek(tensor: Tensor) -> Tensor:
    """The values behind any number of `vmap` levels; the order of the dimensions is undefined.

    Only for validation: inside `vmap`, `.item()` fails on a tensor with samples, but not on the
    tensor behind it.
    """
    return _innermost(tensor).detach()


def differentiable(value: object) -> bool:
    """Whether `value` is a tensor that requires a gradient, behind any number of `vmap` levels."""
    return isinstance(value, Tensor) and _innermost(value).requires_grad


def _innermost(tensor: Tensor) -> Tensor:
    while _functorch.is_batchedtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
