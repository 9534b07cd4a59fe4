"""How `torch.func.vmap` wraps tensors: the only module that uses functorch's internals.

Inside `vmap`, a tensor that has samples is a wrapper around a *physical* tensor with one more
dimension, the samples. Rules and validation need the physical tensor. The documented access to it,
the `vmap` staticmethod of `autograd.Function`, takes about 0.4 ms a call, several times the
arithmetic of a small layer.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue] - no stub has it


def level() -> int:
    """The nesting level of the innermost running `vmap` (or other transform); 0 outside of all."""
    found: int | None = _functorch.maybe_current_level()
    return 0 if found is None else found


def depth() -> int:
    """How many transforms are running, to be given to `unwind`."""
    found: int = _functorch.get_dynamic_layer_stack_depth()
    return found


_ENDS = {
    _functorch.TransformType.Vmap: _functorch._vmap_decrement_nesting,
    _functorch.TransformType.Grad: _functorch._grad_decrement_nesting,
    _functorch.TransformType.Jvp: _functorch._jvp_decrement_nesting,
    _functorch.TransformType.Functionalize: _functorch._func_decrement_nesting,
}
"""The function that ends each kind of transform. In PyTorch 2.6 its own function for returning to a
depth, `pop_dynamic_layer_stack_and_undo_to_depth`, ends two transforms at each step."""


def unwind(depth: int) -> None:
    """End transforms that an interrupt has left running, until only `depth` of them are."""
    while _functorch.get_dynamic_layer_stack_depth() > depth:
        _ENDS[_functorch.peek_interpreter_stack().key()]()


@contextmanager
def beneath() -> Iterator[None]:
    """Leave the innermost `vmap` in this context, to compute on physical tensors."""
    saved = _functorch.pop_dynamic_layer_stack()
    depth_beneath = depth()
    try:
        yield
    finally:
        unwind(depth_beneath)  # Python may swallow an interrupt, in a generator that it finalises
        _functorch.push_dynamic_layer_stack(saved)


@contextmanager
def below(at: int) -> Iterator[None]:
    """Leave the `vmap` at nesting level `at`, and all that run inside it, in this context."""
    with ExitStack() as stack:
        while level() >= at:
            stack.enter_context(beneath())
        yield


def outside() -> AbstractContextManager[None]:
    """Leave every running `vmap` in this context."""
    return below(1)


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


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform that is running, `vmap` or another, has wrapped `tensor`."""
    return bool(_functorch.is_functorch_wrapped_tensor(tensor))


def inner(tensor: Tensor, at: int) -> Tensor:
    """The tensor as it is at nesting level `at`, outside the `vmap`s that run inside that one."""
    while is_batched(tensor) and _functorch.maybe_get_level(tensor) > at:
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def with_samples_of(tensor: Tensor, other: Tensor, at: int) -> Tensor:
    """`tensor`, of the shape of `inner(other, at)`, wrapped as `other` is above level `at`."""
    if not is_batched(other) or _functorch.maybe_get_level(other) <= at:
        return tensor
    wrapped: Tensor = _functorch._add_batch_dim(
        with_samples_of(tensor, _functorch.get_unwrapped(other), at),
        _functorch.maybe_get_bdim(other),
        _functorch.maybe_get_level(other),
    )
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
