"""Protected parameters, the parts of them that a model takes, and what it makes of these.

A model seldom uses a parameter just as it is: it splits and transposes it, casts it, adds one to
it. None of this involves the samples, so the gradients of the samples with respect to what was
made lead back to those with respect to the parameter, and their squares to its total.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ewc import _vmap
from ewc.fisher.compositions import Overlapping, Scaled
from ewc.fisher.gradients import Gradient, Several


def _functions(*names: str) -> set[Callable[..., Any]]:
    """What PyTorch calls so, as a function and as a method."""
    owners = (torch, torch.Tensor, F)
    return {getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)}


VIEWS = _functions(
    *("broadcast_to", "chunk", "expand", "expand_as", "flatten", "moveaxis", "movedim", "narrow"),
    *("permute", "ravel", "reshape", "reshape_as", "select", "split", "squeeze", "swapaxes"),
    *("swapdims", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as"),
) | {
    torch.Tensor.__getitem__,
    torch.Tensor.T.__get__,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
}
"""Functions whose result is part of their first argument, in another shape."""

CASTS = _functions(
    *("bfloat16", "clone", "contiguous", "double", "float", "half", "to", "type", "type_as")
)
"""Functions whose result has the values of their first argument, perhaps in another type."""

ELEMENTWISE = _functions(
    *("__pow__", "__rdiv__", "__rpow__", "__rsub__", "__rtruediv__", "abs", "add", "clamp", "clip"),
    *("cos", "div", "elu", "erf", "exp", "exp2", "expm1", "gelu", "log", "log10", "log1p", "log2"),
    *("logsigmoid", "mul", "multiply", "neg", "negative", "pow", "reciprocal", "relu", "rsqrt"),
    *("rsub", "sigmoid", "silu", "sin", "softplus", "sqrt", "square", "sub", "subtract", "tanh"),
    *("true_divide",),
)
"""Functions whose result depends, in each element, on one element of the argument alone."""


@dataclass
class Part:
    """Elements of a parameter, in the order and the shape in which a model uses them.

    Attributes:
        parameter: Whose elements they are.
        within: Where they lie, a view of the parameter's layout; None for all of it.
        uses: How many operations use it.
        gradients: What came back to each use, if they cannot be squared at once.
    """

    parameter: "Protected"
    within: Tensor | None = None
    uses: int = 0
    gradients: list[Gradient] = field(default_factory=list)

    @property
    def place(self) -> Tensor:
        """Where they lie, without the memory."""
        return self.parameter.layout if self.within is None else self.within

    @property
    def total(self) -> Tensor:
        """The same part of the parameter's sum of squares."""
        total, place = self.parameter.total, self.within
        if place is None:
            return total
        offset = total.storage_offset() + place.storage_offset()
        return total.as_strided(place.shape, place.stride(), offset)

    @property
    def span(self) -> tuple[int, int]:
        """The first of its elements in memory, and the one behind its last."""
        place = self.place
        start = int(place.storage_offset())
        steps = zip(place.shape, place.stride(), strict=True)
        return start, start + 1 + sum((size - 1) * step for size, step in steps)

    def receive(self, gradient: Gradient) -> None:
        """Square the gradient, or keep it until all uses can be summed."""
        if self.uses == 1 and not self.parameter.overlapping:
            gradient.add_squares(self.total)
        else:
            self.gradients.append(gradient)

    def summed(self) -> Gradient:
        """The sum of what the uses received, which is then forgotten."""
        kinds = {type(gradient) for gradient in self.gradients}
        join = kinds.pop().joined if len(kinds) == 1 else Several
        gradients, self.gradients = self.gradients, []
        return join(gradients)


class Protected:
    """A protected parameter, and the parts of it that a model uses.

    Args:
        name: Its name.
        parameter: It.
        totals: Where squares are added, by name. Asked for only when there are some: memory for
            those of a sharded parameter is there no longer than needed.

    Attributes:
        whole: The part that is all of it.
    """

    def __init__(self, name: str, parameter: Tensor, totals: Mapping[str, Tensor]) -> None:
        self.name, self.device = name, parameter.device
        self._parameter, self._totals = parameter, totals
        self.whole = Part(self)
        self._others: dict[tuple[Any, ...], Part] = {}

    @cached_property
    def layout(self) -> Tensor:
        """How the elements of its total lie in memory, without the memory."""
        # A sharded parameter has no strides while it is not gathered; gathered, it is contiguous.
        strided = any(self._parameter.stride())
        return torch.empty_like(
            self._parameter,
            device="meta",
            requires_grad=False,
            memory_format=torch.preserve_format if strided else torch.contiguous_format,
        )

    @property
    def total(self) -> Tensor:
        """The sum of its squares."""
        return self._totals[self.name]

    def part(self, place: Tensor) -> Part:
        """The part whose elements lie at `place`, a view of the layout."""
        key = _lie(place)
        if key == _lie(self.layout):
            return self.whole
        return self._others.setdefault(key, Part(self, place))

    @property
    def parts(self) -> Iterable[Part]:
        """All parts that were taken."""
        return self.whole, *self._others.values()

    @property
    def used(self) -> bool:
        """Whether an operation with a rule uses it."""
        return any(part.uses for part in self.parts)

    @cached_property
    def overlapping(self) -> bool:
        """Whether parts are used that share elements; to be asked when the model has run."""
        used = [part for part in self.parts if part.uses]
        if len(used) < 2:
            return False
        spans = sorted(part.span for part in used)
        return any(stop > start for (_, stop), (start, _) in pairwise(spans))

    def flush(self) -> None:
        """Square what was kept, when a reverse pass is over."""
        kept = [(part.total, part.summed()) for part in self.parts if part.gradients]
        if kept and self.overlapping:
            Overlapping(self.total, kept).add_squares(self.total)
        else:
            for total, gradient in kept:
                gradient.add_squares(total)


def _lie(place: Tensor) -> tuple[Any, ...]:
    """What tells the place of one part from that of another."""
    return place.storage_offset(), place.shape, place.stride()


Made = tuple[Any, list["View"]]
"""What a function returns, and a view for each tensor in it; or none, if it made something else."""


@dataclass(frozen=True)
class View:
    """What a model has in its hands in place of a part of a parameter.

    Attributes:
        tensor: It; held, so that its `id` stays its own.
        part: Which elements it holds, or is made of.
        factor: Its derivative by them, element by element, `[*shape]`; None for one.
        version: The state of `tensor`, which the model may write into if it made it itself.
    """

    tensor: Tensor
    part: Part
    factor: Tensor | None = None
    version: int | None = None

    @property
    def stale(self) -> bool:
        """Whether the model has written into it."""
        return self.version is not None and self.tensor._version != self.version

    def receive(self, gradient: Gradient) -> None:
        """Pass on what came back to one use."""
        self.part.receive(gradient if self.factor is None else Scaled(gradient, self.factor))

    def parts(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> "Made":
        """Take parts of it by `func`, one of `VIEWS`."""
        indexed = func is torch.Tensor.__getitem__
        if indexed and any(isinstance(each, Tensor) for each in tree_leaves(args)):
            return None, []  # perhaps by a tensor of the samples' own
        taken = func(self.tensor, *args, **kwargs)
        places = func(self.part.place, *args, **kwargs)
        factors = None if self.factor is None else func(self.factor, *args, **kwargs)
        if isinstance(taken, Tensor):
            each = [(taken, places, factors)]
        else:
            each = list(zip(taken, places, factors or [None] * len(taken), strict=True))
        views = []
        layout = self.part.parameter.layout
        for tensor, place, factor in each:
            if tensor.numel() > self.tensor.numel() or not (
                place is layout or place._base is layout
            ):
                return taken, []  # read twice, or copied: with no place of its own in the total
            part = self.part.parameter.part(place)
            views.append(View(tensor, part, factor, tensor._version))
        return taken, views

    def made(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> "Made":
        """Call `func`, one of `CASTS` or `ELEMENTWISE`, with it among the arguments."""
        made = func(*args, **kwargs)
        if not (
            isinstance(made, Tensor)
            and not _vmap.is_batched(made)
            and made.requires_grad
            and made.shape == self.tensor.shape
            and made.device == self.part.parameter.device
        ):
            return made, []
        factor = self.factor
        if func in ELEMENTWISE:
            ones = torch.ones_like(made)
            (slope,) = torch.autograd.grad(made, self.tensor, ones, retain_graph=True)
            factor = slope if factor is None else slope * factor
        return made, [View(made, self.part, factor, made._version)]
