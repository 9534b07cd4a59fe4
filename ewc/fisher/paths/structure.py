"""How effective weights depend on a parameter, found out by autograd.

With `J` for the derivative of an effective weight `q` by a parameter `p`, the gradient of sample n
is `J^T g_n`. Where every entry of `p` reaches at most one entry of `q`, squares need no per-sample
gradients of `p`:

    sum_n (J^T g_n)^2 = (J^T sqrt(sum_n g_n^2))^2

Views, casts and elementwise functions are of this kind. Which are, is tested and not listed:
`(J^T v)^2 = J^T(v^2) J^T 1`, for vectors `v` that tell any two entries apart, if and only if `J` is
of this kind.
"""

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ewc.fisher.paths.graph import nodes
from ewc.fisher.paths.weights import Weight


class Structures:
    """Which parameters reach at most one entry of their weights, decided once for each structure.

    To sum before squaring is right for any structure, so the verdict that a parameter needs it is
    kept for the whole collection. The verdict that it does not is kept for as long as the same
    graphs lead to the weights, from equal constants: reading a verdict waits for a device.

    Args:
        keep: Whether verdicts are kept. Several processes that gather a parameter together must
            decide together, every time.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._joint: set[str] = set()
        self._separate: dict[str, _Graphs] = {}

    def are_separate(self, name: str, weights: Sequence[Weight]) -> bool:
        """Whether every entry of a parameter reaches at most one entry, of all the weights.

        Args:
            name: The parameter's name.
            weights: All weights that were made of it.
        """
        if len(weights) == 1 and weights[0].is_parameter:
            return True
        if any(weight.is_parameter or weight.layout.is_complex() for weight in weights):
            return False
        if not self._keep:
            return _are_separate(weights, weights[0].parameters[name])
        if name in self._joint:
            return False
        graphs, known = _Graphs.of(weights), self._separate.get(name)
        if graphs is not None and known is not None and known.equal(graphs):
            return True
        is_separate = _are_separate(weights, weights[0].parameters[name])
        if not is_separate:
            self._joint.add(name)
        elif graphs is not None:
            self._separate[name] = graphs
        return is_separate


def lead_back(
    weights: Sequence[Weight],
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    batched: bool = False,
) -> list[Tensor | None]:
    """The gradients of parameters, `sum over weights of J^T g`, or None where nothing arrives.

    Args:
        weights: The weights, of which none is a parameter.
        gradients: For each its gradient, `[*shape]`, or `[n, *shape]` if `batched`.
        parameters: The parameters.
        batched: Whether the gradients are those of n samples.
    """
    typed = [g.to(w.layout.dtype) for w, g in zip(weights, gradients, strict=True)]
    found: Sequence[Tensor | None] = torch.autograd.grad(
        [weight.edge for weight in weights],
        parameters,
        typed,
        retain_graph=True,  # a model may keep a weight for its next run
        allow_unused=True,
        is_grads_batched=batched,
    )
    return list(found)


def _are_separate(weights: Sequence[Weight], parameter: Tensor) -> bool:
    graph = nodes(*[weight.edge.node for weight in weights])
    if any(isinstance(node, BackwardCFunction) for node in graph):
        return False  # the user's reverse pass may be anything, and need not be linear
    if parameter.is_complex():
        return False
    reached = torch.zeros(parameter.shape, dtype=torch.int32, device=parameter.device)
    holds = []
    for weight in weights:
        slope = _back(weight, torch.ones((), device=weight.device), parameter)
        for v in _probes(weight):
            once, twice = _back(weight, v, parameter), _back(weight, v * v, parameter)
            holds.append((once * once == twice * slope).all())
        for scale in _scales(weight):
            holds.append((_back(weight, scale, parameter) == scale * slope).all())
        reached += slope != 0
    return bool(torch.stack([*holds, (reached <= 1).all()]).all())


def _back(weight: Weight, gradient: Tensor, parameter: Tensor) -> Tensor:
    """`J^T g` in at least float32; of a gradient that broadcasts to the weight."""
    (found,) = lead_back([weight], [gradient.expand(weight.layout.shape)], [parameter])
    if found is None:
        return torch.zeros(parameter.shape, device=parameter.device)
    found = found.to_dense() if found.is_sparse else found
    return found.to(torch.promote_types(found.dtype, torch.float32))


def _probes(weight: Weight) -> Iterator[Tensor]:
    """The vectors `v`: powers of two, so that any two entries differ in one vector at least.

    The exponents are the digits of an entry's index. Scaling by powers of two commutes with
    rounding: both sides of the identity are equal to the last bit, in half precision too.
    """
    index = torch.arange(weight.layout.numel(), device=weight.device).view(weight.layout.shape)
    bits = _digit_bits(weight)
    for shift in range(0, max(1, weight.layout.numel() - 1).bit_length(), bits):
        yield 1 << (index >> shift & (2**bits - 1))


def _scales(weight: Weight) -> list[Tensor]:
    """Numbers by which a gradient is multiplied, to see that the way back is linear.

    It need not be: the user may have registered a hook that clips gradients.
    """
    exponent = 2 ** _digit_bits(weight)
    found = [-1.0, 2.0**exponent, 2.0**-exponent]
    return [torch.tensor(each, device=weight.device) for each in found]


def _digit_bits(weight: Weight) -> int:
    """Squares of `2 ** (2 ** bits - 1)` are in the range of the dtype."""
    return 3 if weight.layout.element_size() < 4 else 5


@dataclass(frozen=True)
class _Graphs:
    """All that the derivatives of some weights depend on, but for the parameters.

    Attributes:
        nodes: The operations, how they are connected, and their options.
        constants: Copies of the tensors that they keep and that no parameter is in.
    """

    nodes: list[Hashable]
    constants: list[Tensor]

    @classmethod
    def of(cls, weights: Sequence[Weight]) -> "_Graphs | None":
        """None if the graphs hide something, or if reading it would wait for a device."""
        found = list(nodes(*[weight.edge.node for weight in weights]))
        numbers = {node: number for number, node in enumerate(found)}
        numbers[None] = -1
        described: list[Hashable] = [
            (numbers[weight.edge.node], weight.edge.output_nr, weight.layout.shape)
            for weight in weights
        ]
        constants: list[Tensor] = []
        for node in found:
            described += [(numbers[each], at) for each, at in node.next_functions]
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                described.append(id(leaf))
                continue
            if not _GENERATED.search(node.name()):
                return None
            described.append(node.name())
            for saved in _saved(node):
                if not isinstance(saved, Tensor):
                    described.append(repr(saved))
                elif saved.requires_grad:
                    continue  # made of parameters, which stay as they are
                elif saved.is_cpu:
                    constants.append(saved.clone())
                else:
                    return None
        return cls(described, constants)

    def equal(self, other: "_Graphs") -> bool:
        """Whether the weights depend on the parameters in the same way."""
        return self.nodes == other.nodes and all(map(torch.equal, self.constants, other.constants))


_GENERATED = re.compile(r"Backward\d+$")
"""The names of PyTorch's own nodes, which show all that they keep.

Those of autograd.Functions, of scripted code and of writes into slices do not.
"""


def _saved(node: Any) -> Iterator[Any]:
    """What a node of autograd keeps: tensors, numbers, shapes."""
    for attribute in dir(node):
        if attribute.startswith("_saved_"):
            value = getattr(node, attribute)
            is_several = isinstance(value, (tuple, list)) and any(
                isinstance(each, Tensor) for each in value
            )
            yield from value if is_several else (value,)
