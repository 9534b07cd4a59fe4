"""Sees every operation that a model performs, and replaces those that touch a parameter.

While a model runs on single samples inside `vmap`, a `TorchFunctionMode` is shown each call of a
PyTorch function, whichever module or hand-written code makes it. A call with a protected
parameter among its arguments is

1. remembered, if it takes a part of the parameter, or makes something of its elements one by one;
2. done by its *rule*, or rewritten into simpler calls, if there is one;
3. otherwise done with a *copy per sample* of the parameter (an expanded view, without memory),
   whose ordinary gradient is then the per-sample gradient.

A parameter goes one way or the other for the whole pass. The first forward pass begins with rules
for all; what it meets that has no rule is remembered in `without_rule`, and the engine starts over.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ewc import _vmap
from ewc.fisher.gradients import Gradient
from ewc.fisher.paths.parts import CASTS, ELEMENTWISE, VIEWS, Protected, View
from ewc.fisher.rules.registry import ALWAYS, REWRITINGS, RULES, NotCovered, takes

READING = {
    getattr(torch.Tensor, name)
    for name in ("__bool__", "__contains__", "__float__", "__index__", "__int__", "item", "tolist")
}
"""Functions that read values out of a tensor, for a model to branch on."""

_REVERSING = {torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward}

_STRIDED = {torch.as_strided, torch.Tensor.as_strided}


class Apart(Exception):  # noqa: N818 - it says what is the case, as StopIteration does
    """The samples of a batch must go apart: the model reads different values from them.

    Attributes:
        groups: The samples that agree, so far.
    """

    def __init__(self, groups: list[list[int]]) -> None:
        super().__init__("the model reads values out of a tensor that differ between samples")
        self.groups = groups


class Interception(TorchFunctionMode):
    """One forward pass of a model on N samples inside `vmap`; an `Operation` for the rules.

    Args:
        parameters: The protected parameters by name.
        totals: For each, where its squares are added.
        copied: The names of those that are given to the model as one copy per sample.
        count: N.

    Attributes:
        level: The nesting level of that `vmap`, to be set before the mode is entered.
        copies: By name, the copies of those parameters, `[N, *shape]`.
        last: Whether no other reverse pass will follow the present one.
        without_rule: The names of parameters that met an operation without a rule.
        reads: Whether the model has read values out of a tensor, to branch on them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        totals: Mapping[str, Tensor],
        copied: Iterable[str],
        count: int,
    ) -> None:
        super().__init__()
        self.count = count
        self.level = 0
        self.copies: dict[str, Tensor] = {}
        self.last = False
        self._kept: dict[int, int] = {}
        self.without_rule: set[str] = set()
        self.reads = False
        self._protected: list[Protected] = []
        self._views: dict[int, View] = {}
        self._copied: dict[int, str] = {}
        self._batched: dict[int, Tensor] = {}
        copied = set(copied)
        for name, parameter in parameters.items():
            if name in copied:
                self._copied[id(parameter)] = name
            else:
                protected = Protected(name, parameter, totals)
                self._protected.append(protected)
                self._views[id(parameter)] = View(parameter, protected.whole)

    @property
    def by_rule(self) -> set[str]:
        """The names of the parameters that an operation with a rule used."""
        return {each.name for each in self._protected if each.used}

    @property
    def kept(self) -> int:
        """How many bytes there are in what went into operations with a rule, and what came out."""
        return sum(self._kept.values())

    def flush(self) -> None:
        """Square what was used more than once, when a reverse pass is over."""
        for each in self._protected:
            each.flush()

    # What rules call.

    def samples(self, tensor: Tensor) -> Tensor:
        """See `Operation.samples`."""
        if id(tensor) in self._views:
            self._leave(self._views[id(tensor)])
            raise NotCovered
        inner = _vmap.physical(tensor, self.level)
        if inner is None:
            return tensor.expand(self.count, *tensor.shape)
        self._weigh(inner)
        return inner

    def protects(self, tensor: Tensor) -> bool:
        """See `Operation.protects`."""
        return id(tensor) in self._views

    def varies(self, tensor: Tensor) -> bool:
        """See `Operation.varies`."""
        return _vmap.is_batched(tensor, self.level)

    def value(self, parameter: Tensor) -> Tensor:
        """See `Operation.value`."""
        if _vmap.is_batched(parameter, self.level) or parameter.is_complex():
            raise NotCovered
        return parameter.detach()

    def watch(
        self, output: Tensor, gradients: Mapping[Tensor | None, Callable[[Tensor], Gradient]]
    ) -> Tensor:
        """See `Operation.watch`."""
        watched = []
        for parameter, gradient in gradients.items():
            view = self._views.get(id(parameter))
            if view is not None:
                view.part.uses += 1
                watched.append((view, gradient))
        if not watched:
            return output
        self._weigh(output)

        def receive(g: Tensor) -> None:
            for view, gradient in watched:
                view.receive(gradient(g.detach()))
            if self.last:
                watched.clear()  # and with it what the rules have kept

        if not output.requires_grad:
            root = output.detach().requires_grad_()
            root.register_hook(receive)
            return _same(root)
        if output._is_view():
            output = _same(output)
        output.register_hook(receive)
        return output

    # What PyTorch calls.

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Perform one call of `func`."""
        kwargs = kwargs or {}
        if func is torch.Tensor.__contains__:
            func, args = torch.Tensor.__bool__, ((args[0] == args[1]).any(),)
        if self._copied:
            args, kwargs = self._with_copies(args), self._with_copies(kwargs)
        found = self._found(args)
        if kwargs:
            found += self._found(kwargs.values())
        if func in READING and _vmap.is_batched(args[0], self.level):
            return self._read(func, *args, **kwargs)
        if func in _REVERSING and _vmap.level() == self.level:
            # What is watched would take these gradients for those of the terms, and those would
            # not come back through them to the parameters.
            raise RuntimeError("the model differentiates by autograd inside its forward")
        if func in _STRIDED and self._is_copy(args[0]):
            # All copies lie in the same memory, and its gradient is shared out among them.
            raise RuntimeError("the model reads a parameter by as_strided")
        if not (found or func in ALWAYS) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        for view in found:
            if view.stale:
                self._leave(view)
        if len(found) == 1 and _vmap.level() == self.level:
            outputs = self._remembered(found[0], func, args, kwargs)
            if outputs is not None:
                return outputs
        try:
            if func in REWRITINGS and takes(REWRITINGS[func], args, kwargs):
                with self:
                    return REWRITINGS[func](*args, **kwargs)
            ruled = func in RULES and takes(RULES[func], (self, *args), kwargs)
            if ruled and _vmap.level() == self.level:
                with _vmap.beneath():
                    outputs = RULES[func](self, *args, **kwargs)
                return self._wrapped(outputs)
        except NotCovered:
            if any(view.part.parameter.name in self.without_rule for view in found):
                return func(*args, **kwargs)  # to be done again, with copies of that one alone
        body = _body(func) if found else None
        if body is not None:
            with self:
                return body(*args, **kwargs)
        outputs = func(*args, **kwargs)
        if any(_vmap.differentiable(out) for out in tree_leaves(outputs)):
            for view in found:
                self._leave(view)
        return outputs

    def _wrapped(self, outputs: Any) -> Any:
        """What a rule returned, as the model sees it."""
        if isinstance(outputs, Tensor):
            return _vmap.logical(outputs, self.level)
        return tree_map_only(Tensor, lambda out: _vmap.logical(out, self.level), outputs)

    def _is_copy(self, tensor: Tensor) -> bool:
        """Whether it is a copy per sample of a parameter, or a view of one."""
        inner = _vmap.physical(tensor, self.level)
        return inner is not None and inner.stride(0) == 0

    def _vary(self, arguments: Iterable[Any]) -> bool:
        return any(isinstance(each, Tensor) and self.varies(each) for each in arguments)

    def _leave(self, view: View) -> None:
        """Leave the parameter to another path than rules."""
        self.without_rule.add(view.part.parameter.name)

    def _found(self, arguments: Iterable[Any]) -> list[View]:
        """The protected parameters, and parts of them, among the arguments of a call."""
        views = self._views
        found = []
        for argument in arguments:
            if id(argument) in views:
                found.append(views[id(argument)])
            elif isinstance(argument, (tuple, list)):
                found += self._found(argument)
        return found

    def _read(self, func: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Read values out of a tensor that has others for each sample, if they are the same."""
        self.reads = True
        values = _vmap.physical(tensor, self.level)
        if values is None or _vmap.level() != self.level:
            return func(tensor, *args, **kwargs)
        compared = values.bool() if func is torch.Tensor.__bool__ else values
        groups: dict[tuple[Any, ...], list[int]] = {}
        for sample, row in enumerate(compared.reshape(self.count, -1).tolist()):
            groups.setdefault(tuple(row), []).append(sample)
        if len(groups) > 1:
            raise Apart(list(groups.values()))
        return func(values[0], *args, **kwargs)

    def _with_copies(self, arguments: Any) -> Any:
        """The arguments of a call, parameters replaced by their copy for each sample."""

        def replace(tensor: Tensor) -> Tensor:
            key = id(tensor)
            if key not in self._copied:
                return tensor
            if key not in self._batched:
                with _vmap.beneath():
                    copy = tensor.detach().expand(self.count, *tensor.shape).requires_grad_()
                self.copies[self._copied[key]] = copy
                self._batched[key] = _vmap.logical(copy, self.level)
            return self._batched[key]

        return tree_map_only(Tensor, replace, arguments)

    def _remembered(
        self, view: View, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Take a part of a parameter, or make something of its elements, and remember whose it is.

        Returns:
            None if the function does something else, or its result cannot be remembered.
        """
        if func in VIEWS and args[:1] and args[0] is view.tensor:
            outputs, views = view.parts(func, *args[1:], **kwargs)
        elif func in CASTS or (func in ELEMENTWISE and not self._vary(args)):
            outputs, views = view.made(func, *args, **kwargs)
        else:
            return None
        for each in views:
            self._views.setdefault(id(each.tensor), each)
        return outputs if views else None

    def _weigh(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._kept[storage.data_ptr()] = storage.nbytes()


def _same(tensor: Tensor) -> Tensor:
    """The same tensor, but neither leaf nor view: operations in place may write to it."""
    same: Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return same


@cache
def _body(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """What a function of PyTorch that is written in Python does, one call after the other.

    Such a function first asks whether a mode wants to see it, and is done in one piece then. To
    see the calls that it makes, its body is run with that question answered by no.
    """
    if not isinstance(func, FunctionType) or func.__module__ not in (
        "torch.nn.functional",
        "torch.functional",
    ):
        return None
    answers = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
        lambda *tensors: False,
    )
    body = FunctionType(
        func.__code__, {**func.__globals__, **answers}, func.__name__, None, func.__closure__
    )
    body.__defaults__, body.__kwdefaults__ = func.__defaults__, func.__kwdefaults__
    return body
