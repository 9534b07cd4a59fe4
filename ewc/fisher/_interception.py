"""Sees every operation that a model performs, and replaces those that touch a parameter.

While a model runs on single samples inside `vmap`, a `TorchFunctionMode` is shown each call of a
PyTorch function, whichever module or hand-written code makes it. A call with a protected
parameter among its arguments is

1. done by its *rule*, or rewritten into simpler calls, if there is one;
2. otherwise done with a *copy per sample* of the parameter (an expanded view, without memory),
   whose ordinary gradient is then the per-sample gradient.

A parameter goes one way or the other for the whole pass. The first forward pass begins with rules
for all; what it meets that has no rule is remembered in `without_rule`, and the engine starts over.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ewc import _vmap
from ewc.fisher.gradients import Gradient, Several
from ewc.fisher.rules._registry import ALWAYS, REWRITINGS, RULES, NotCovered

_VIEWS = {
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in (
        "chunk",
        "flatten",
        "narrow",
        "permute",
        "reshape",
        "select",
        "split",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
    )
    if hasattr(owner, name)
} | {
    torch.Tensor.__getitem__,
    torch.Tensor.T.__get__,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
}
"""Functions whose result is part of the parameter itself, in another shape."""

READING = {
    getattr(torch.Tensor, name)
    for name in ("__bool__", "__float__", "__index__", "__int__", "item", "tolist")
}
"""Functions that read values out of a tensor, for a model to branch on."""

_REVERSING = {torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward}


class Apart(Exception):  # noqa: N818 - it says what is the case, as StopIteration does
    """The samples of a batch must go apart: the model reads different values from them.

    Attributes:
        groups: The samples that agree, so far.
    """

    def __init__(self, groups: list[list[int]]) -> None:
        super().__init__("the model reads values out of a tensor that differ between samples")
        self.groups = groups


@dataclass
class View:
    """A protected parameter, or a part of it that the model took.

    Attributes:
        name: The parameter's name.
        tensor: The parameter or the part; held, so that its `id` stays its own.
        take: Takes the same part of the parameter's sum of squares, which may not exist before
            there is a square to add.
        used: How many operations use it.
        gradients: What came back to each use, if there are several.
    """

    name: str
    tensor: Tensor
    take: Callable[[], Tensor]
    used: int = 0
    gradients: list[Gradient] = field(default_factory=list)

    @property
    def place(self) -> tuple[Any, ...]:
        """Which elements of the parameter it holds, and in which order."""
        return self.name, self.tensor.storage_offset(), self.tensor.shape, self._stride

    @property
    def _stride(self) -> tuple[int, ...]:
        """How far apart its elements are in memory."""
        if self.tensor.is_leaf and not any(self.tensor.stride()):
            # A sharded parameter while it is not gathered has none; gathered, it is contiguous.
            return torch.empty(self.tensor.shape, device="meta").stride()
        return self.tensor.stride()

    @property
    def span(self) -> tuple[int, int]:
        """The first of its elements in memory, and the one behind its last."""
        start = int(self.tensor.storage_offset())
        steps = zip(self.tensor.shape, self._stride, strict=True)
        return start, start + 1 + sum((size - 1) * step for size, step in steps)

    def receive(self, gradient: Gradient) -> None:
        """Square the gradient, or keep it until all uses can be summed."""
        if self.used == 1:
            gradient.add_squares(self.take())
        else:
            self.gradients.append(gradient)

    def flush(self) -> None:
        """Sum what several uses received, and square the sum."""
        if not self.gradients:
            return
        kinds = {type(gradient) for gradient in self.gradients}
        join = kinds.pop().joined if len(kinds) == 1 else Several
        join(self.gradients).add_squares(self.take())
        self.gradients = []


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
        self._views: dict[int, View] = {}
        self._places: dict[tuple[Any, ...], View] = {}
        self._held: list[Tensor] = []
        self._copied: dict[int, str] = {}
        self._batched: dict[int, Tensor] = {}
        copied = set(copied)
        for name, parameter in parameters.items():
            if name in copied:
                self._copied[id(parameter)] = name
            else:
                self._add_view(View(name, parameter, partial(totals.__getitem__, name)))

    @property
    def by_rule(self) -> set[str]:
        """The names of the parameters that an operation with a rule used."""
        return {view.name for view in self._places.values() if view.used}

    @property
    def entangled(self) -> set[str]:
        """The names of parameters of which parts were used that share elements."""
        spans: dict[str, list[tuple[int, int]]] = {}
        for view in self._places.values():
            if view.used:
                spans.setdefault(view.name, []).append(view.span)
        return {
            name
            for name, found in spans.items()
            if any(stop > start for (_, stop), (start, _) in pairwise(sorted(found)))
        }

    @property
    def kept(self) -> int:
        """How many bytes there are in what went into operations with a rule, and what came out."""
        return sum(self._kept.values())

    def flush(self) -> None:
        """Square what was used more than once, when a reverse pass is over."""
        for view in self._places.values():
            view.flush()

    # What rules call.

    def samples(self, tensor: Tensor) -> Tensor:
        """See `Operation.samples`."""
        if id(tensor) in self._views:
            raise NotCovered
        inner = _vmap.physical(tensor, self.level)
        if inner is None:
            return tensor.expand(self.count, *tensor.shape)
        self._weigh(inner)
        return inner

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
                view.used += 1
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
        if self._copied:
            args, kwargs = self._with_copies(args), self._with_copies(kwargs)
        found = self._protected(args)
        if kwargs:
            found += self._protected(kwargs.values())
        if func in READING and _vmap.is_batched(args[0], self.level):
            return self._read(func, *args, **kwargs)
        if func in _REVERSING and _vmap.level() == self.level:
            # What is watched would take these gradients for those of the terms, and those would
            # not come back through them to the parameters.
            raise RuntimeError("the model differentiates by autograd inside its forward")
        if not (found or func in ALWAYS) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        try:
            if func in REWRITINGS:
                with self:
                    return REWRITINGS[func](*args, **kwargs)
            if func in RULES and _vmap.level() == self.level:
                with _vmap.beneath():
                    outputs = RULES[func](self, *args, **kwargs)
                return tree_map_only(Tensor, lambda out: _vmap.logical(out, self.level), outputs)
        except NotCovered:
            pass
        if not found:
            return func(*args, **kwargs)
        if func in _VIEWS and args and self._views.get(id(args[0])) is found[0]:
            return self._part(found[0], func, args, kwargs)
        body = _body(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        outputs = func(*args, **kwargs)
        if any(_vmap.differentiable(out) for out in tree_leaves(outputs)):
            self.without_rule.update(view.name for view in found)
        return outputs

    def _protected(self, arguments: Iterable[Any]) -> list[View]:
        """The protected parameters, and parts of them, among the arguments of a call."""
        views = self._views
        found = []
        for argument in arguments:
            if id(argument) in views:
                found.append(views[id(argument)])
            elif isinstance(argument, (tuple, list)):
                found += self._protected(argument)
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

    def _part(
        self, view: View, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Take a part of a parameter, and remember whose it is."""
        parts = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args[1:], kwargs))):
            self.without_rule.add(view.name)  # indexed by a tensor, perhaps of the samples' own
            return parts
        many = isinstance(parts, (tuple, list))

        def take(place: int) -> Tensor:
            totals = func(view.take(), *args[1:], **kwargs)
            total: Tensor = totals[place] if many else totals
            return total

        for place, part in enumerate(parts if many else (parts,)):
            if part.untyped_storage().data_ptr() != view.tensor.untyped_storage().data_ptr():
                self.without_rule.add(view.name)  # a copy: its squares have no place in the total
            else:
                self._add_view(View(view.name, part, partial(take, place)))
        return parts

    def _weigh(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._kept[storage.data_ptr()] = storage.nbytes()

    def _add_view(self, view: View) -> None:
        self._held.append(view.tensor)
        self._views[id(view.tensor)] = self._places.setdefault(view.place, view)


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
