"""How effective weights depend on a parameter, found out by autograd.

With `J` for the derivative of an effective weight `q` by a parameter `p`, the gradient of sample n
is `J^T g_n`. Where every entry of `p` reaches at most one entry of `q`, squares need no per-sample
gradients of `p`:

    sum_n (J^T g_n)^2 = (J^T sqrt(sum_n g_n^2))^2

Views, casts and elementwise functions are of this kind. Which are, is tested and not listed:
`(J^T v)^2 = J^T(v^2) J^T 1`, for vectors `v` that tell any two entries apart, if and only if `J` is
of this kind.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ewc.fisher.paths.graph import Description, describe, keeps_tensors, nodes
from ewc.fisher.paths.weights import Weight


class Structures:
    """Which parameters reach at most one entry of their weights, decided once for each structure.

    To sum before squaring is right for any structure, so the verdict that a parameter needs it is
    kept for the whole collection. The verdict that it does not is kept for as long as the same
    graphs lead to the weights, from equal constants: reading a verdict waits for a device.

    Args:
        in_lockstep: Whether several processes gather parameters together. Then a weight is only
            separate if it is led back without the values of parameters: processes may decide
            differently, and must gather equally often.

    Attributes:
        in_lockstep: The same.
    """

    def __init__(self, *, in_lockstep: bool) -> None:
        self.in_lockstep = in_lockstep
        self._joint: set[str] = set()
        self._separate: dict[str, Description] = {}

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
        edges = [weight.edge for weight in weights]
        if name in self._joint or (self.in_lockstep and keeps_tensors(edges)):
            return False
        graph, known = describe(edges), self._separate.get(name)
        if graph is not None and known is not None and known.equals(graph):
            return True
        is_separate = _are_separate(weights, weights[0].parameters[name])
        if not is_separate:
            self._joint.add(name)
        elif graph is not None:
            self._separate[name] = graph
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

    def grad(gradients: Sequence[Tensor], *, batched: bool) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            [weight.edge for weight in weights],
            parameters,
            gradients,
            retain_graph=True,  # a model may keep a weight for its next run
            allow_unused=True,
            is_grads_batched=batched,
        )
        return found

    try:
        return list(grad(typed, batched=batched))
    except RuntimeError:
        if not batched:
            raise
    # A reverse pass that vmap cannot do, such as one of the user's own, for each sample.
    rows = [grad(row, batched=False) for row in zip(*typed, strict=True)]
    columns = zip(*rows, strict=True)
    return [None if column[0] is None else torch.stack(column) for column in columns]


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
            holds.append(_are_equal(once * once, twice * slope))
        for scale in _scales(weight):
            holds.append(_are_equal(_back(weight, scale, parameter), scale * slope))
        reached += slope != 0
    return bool(torch.stack([*holds, (reached <= 1).all()]).all())


def _are_equal(one: Tensor, other: Tensor) -> Tensor:
    return ((one == other) & one.isfinite()).all()


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
    found = [-(2.0**exponent), 2.0**-exponent]
    return [torch.tensor(each, device=weight.device) for each in found]


def _digit_bits(weight: Weight) -> int:
    """Squares of `2 ** (2 ** bits - 1)` are in the range of the dtype."""
    return 3 if weight.layout.element_size() < 4 else 5
