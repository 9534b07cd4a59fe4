"""Calls on tensors with samples that no rule takes.

Most go on as they are, inside `vmap`. The others:

- A value that the model reads must be the same for all samples (`branches.py`).
- Memory into which samples are written becomes one per sample (`memory.py`).
- What `vmap` refuses is called once for each sample (`per_sample.py`).
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call
from torch.utils._pytree import tree_leaves, tree_map_only

from ewc import _vmap
from ewc.fisher.paths import branches
from ewc.fisher.paths.memory import Memory, address, has_samples, reshapes, writes, written
from ewc.fisher.paths.per_sample import run_per_sample

FUNCTION = custom_function_call
"""How an `autograd.Function` is called inside `vmap`: with the function, then its arguments."""

_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]

_DIFFERENTIABLE = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]

_LEAF = {
    torch.Tensor.requires_grad_,
    torch.Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    torch.Tensor.retain_grad,
}
"""What makes a tensor a leaf of the graph, or keeps its gradient: no parameter's depends on it."""

_NUMPY: set[Any] = {torch.Tensor.numpy, torch.Tensor.__array__}

_HANDLED = {*branches.READS, *_LEAF, *_NUMPY, _DATA, _DIFFERENTIABLE}


class Calls:
    """The calls of one forward pass on N samples inside `vmap`.

    Args:
        samples: N.
        level: The nesting level of the `vmap`.

    Attributes:
        read: Whether the model has read values out of a tensor, to branch on them.
    """

    def __init__(self, samples: int, level: int) -> None:
        self.read = False
        self._samples = samples
        self._level = level
        self._memory = Memory(samples)
        self._separated: dict[int, Tensor] = {}

    def __call__(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Perform a call, once for each sample if `vmap` refuses it."""
        if func is FUNCTION:
            return self._function(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as refusal:
            if _vmap.level() != self._level or not has_samples((args, kwargs)):
                raise
            try:
                return self._instead(func, args, kwargs)
            except branches.DivergentBranches:
                raise
            except Exception:
                raise refusal from None  # it says more

    def concerns(self, func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
        """Whether `with_own_memory` or `handles` may act in a call.

        Called for every operation of the model, and nearly always false.
        """
        return bool(self._memory.blocks) or "out" in kwargs or _acts_on(func)

    def handles(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        """Whether a call is one for `handle`."""
        return func in _HANDLED and _vmap.is_batched(args[0])

    def handle(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Perform a call that must not go on as it is, whatever else holds for it."""
        tensor, *others = args
        if func in _LEAF:
            return tensor
        if func in _NUMPY:
            raise RuntimeError("the model leaves PyTorch by numpy()")
        if func == _DATA:
            return tensor.detach()
        if func == _DIFFERENTIABLE:
            return _vmap.differentiable(tensor)
        if not _vmap.is_batched(tensor, self._level):
            return func(*args, **kwargs)
        self.read = True
        values = _vmap.physical(tensor, self._level)
        if values is None or _vmap.level() != self._level:
            return func(*args, **kwargs)
        return branches.read(func, values, *others, **kwargs)

    def shared(self, tensor: Tensor) -> Tensor:
        """The value of a tensor, which must be the same for all samples."""
        values = _vmap.physical(tensor, self._level)
        if values is None:
            return tensor
        self.read = True
        value: Tensor = branches.read(Tensor.detach, values)
        return value

    def with_own_memory(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        copies: Callable[[Tensor], Tensor | None],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, those replaced whose memory is one per sample.

        If the call writes samples into other memory, that is first made one per sample.

        Args:
            func: The function.
            args: Its arguments.
            kwargs: Its keyword arguments.
            copies: Gives the copies per sample of an effective weight; None for other tensors.
        """
        if self._memory.blocks:
            if reshapes(func) and self._memory.holds(args[0]):
                raise RuntimeError("the model changes the shape of a tensor that it has written")
            args, kwargs = self._memory.current((args, kwargs), self._level)
        target = written(func, args, kwargs)
        if target is None:
            return args, kwargs
        targets = [each for each in tree_leaves(target) if isinstance(each, Tensor)]
        if any(address(_vmap.inner(each, 0)) in self._separated for each in targets):
            raise RuntimeError("the model writes into a view that vmap has had to copy")
        shared = [each for each in targets if not _vmap.is_wrapped(each)]
        if shared and _vmap.level() == self._level and has_samples((args, kwargs)):
            with _vmap.beneath(), torch.enable_grad():
                for each in shared:
                    self._memory.divide(each, copies)
            args, kwargs = self._memory.current((args, kwargs), self._level)
        return args, kwargs

    def current(self, outputs: Any) -> Any:
        """The outputs of the model, as its writes have left them."""
        return self._memory.current(outputs, self._level)

    def _function(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call an `autograd.Function`."""
        if _vmap.level() == self._level:
            if not has_samples((args, kwargs)):
                with _vmap.beneath():
                    return function.apply(*args, **kwargs)
            has_rule = function.vmap is not torch.autograd.Function.vmap
            if not function.generate_vmap_rule and not has_rule:
                return self._per_sample(function.apply, args, kwargs)
        return FUNCTION(function, *args, **kwargs)

    def _instead(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Perform a call that `vmap` has refused."""
        numbers, named = tree_map_only(Tensor, self._number, (args, kwargs))
        if any(map(is_not, tree_leaves((numbers, named)), tree_leaves((args, kwargs)))):
            # A number has no methods of Tensor, such as the one that formats it.
            with suppress(RuntimeError, TypeError, AttributeError):
                return func(*numbers, **named)
        if func is not torch.Tensor.view:
            self.read = True  # the sizes of its outputs may depend on values
            return self._per_sample(func, args, kwargs)
        # What is contiguous for one sample need not be so with all samples in front.
        outputs = args[0].reshape(*numbers[1:], **named)
        self._separate(_vmap.inner(args[0], 0), _vmap.inner(outputs, 0))
        return outputs

    def _number(self, tensor: Tensor) -> Any:
        """A whole number that all samples share, such as a size, which PyTorch would read."""
        values = _vmap.physical(tensor, self._level)
        if values is None or values.dim() != 1 or values.is_floating_point():
            return tensor
        if values.dtype is torch.bool or bool((values != values[0]).any()):
            return tensor
        self.read = True
        return int(values[0])

    def _per_sample(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            outputs, separated = run_per_sample(
                func, args, kwargs, samples=self._samples, level=self._level
            )
        except branches.DivergentBranches:
            self.read = True
            raise
        self._separate(*separated)
        return outputs

    def _separate(self, *tensors: Tensor) -> None:
        """Note tensors that would share memory in a run on one sample, and do not here."""
        self._separated.update((address(each), each) for each in tensors)


@cache
def _acts_on(func: Callable[..., Any]) -> bool:
    """Whether a function is handled, or writes to its first argument."""
    return func in _HANDLED or writes(func)
