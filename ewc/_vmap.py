"""The one place that knows how `torch.func.vmap` wraps tensors.

Fisher collection runs a model on single samples inside `vmap`: every tensor is then a wrapper
around a *physical* tensor with one more dimension, the samples. Rules and validation need the
physical tensor. The documented way to it, the `vmap` staticmethod of `autograd.Function`, costs
about 0.4 ms a call, several times the arithmetic of a small layer, so this module uses the
functions beneath it. They are PyTorch internals: nothing else in the library touches them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor
from torch._C import _functorch


def level() -> int:
    """The nesting level of the innermost `vmap` (or other transform) that is running, 0 if none."""
    found: int | None = _functorch.maybe_current_level()
    return 0 if found is None else found


@contextmanager
def beneath() -> Iterator[None]:
    """Step out of the innermost `vmap`, so that physical tensors are computed on as usual."""
    saved = _functorch.pop_dynamic_layer_stack()
    try:
        yield
    finally:
        _functorch.push_dynamic_layer_stack(saved)


@contextmanager
def outside() -> Iterator[None]:
    """Step out of every `vmap` that is running."""
    with ExitStack() as stack:
        while level():
            stack.enter_context(beneath())
        yield


def is_batched(tensor: Tensor, at: int | None = None) -> bool:
    """Whether `tensor` carries the samples of the `vmap` at nesting level `at`, None for any."""
    batched = bool(_functorch.is_batchedtensor(tensor))
    return batched and (at is None or _functorch.maybe_get_level(tensor) == at)


def physical(tensor: Tensor, at: int) -> Tensor | None:
    """The tensor behind the `vmap` at level `at`, samples in front; None if it has no samples."""
    if not is_batched(tensor, at):
        return None
    inner: Tensor = _functorch.get_unwrapped(tensor)
    dim: int = _functorch.maybe_get_bdim(tensor)
    return inner.movedim(dim, 0) if dim else inner


def logical(tensor: Tensor, at: int) -> Tensor:
    """The inverse of `physical`: dimension 0 becomes the samples of the `vmap` at level `at`."""
    wrapped: Tensor = _functorch._add_batch_dim(tensor, 0, at)
    return wrapped


def peek(tensor: Tensor) -> Tensor:
    """The values behind any number of `vmap` levels, dimensions in no promised order.

    For validation alone: inside `vmap` a tensor cannot be read (`.item()`), what it wraps can.
    """
    return _innermost(tensor).detach()


def differentiable(value: object) -> bool:
    """Whether `value` is a tensor that autograd follows, behind any number of `vmap` levels."""
    return isinstance(value, Tensor) and _innermost(value).requires_grad


def _innermost(tensor: Tensor) -> Tensor:
    while _functorch.is_batchedtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
