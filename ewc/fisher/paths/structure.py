"""How effective weights depend on parameters, found out by autograd.

With `J` for the derivative of an effective weight `q` by a parameter `p`, the gradient of sample n
is `J^T g_n`. Where every entry of `p` reaches at most one entry of `q`, squares need no per-sample
gradients of `p`:

    sum_n (J^T g_n)^2 = (J^T sqrt(sum_n g_n^2))^2

entry by entry. Views, casts and elementwise functions are of this kind. It is tested, not listed:
`(J^T v)^2 = J^T(v^2) J^T 1` must hold for a few vectors `v`, chosen so that any two entries differ
in one of them.
"""

from collections.abc import Iterator, Mapping, Sequence, Set

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ewc.fisher.paths.graph import Description, describe, keeps_tensors, nodes
from ewc.fisher.paths.weights import Weight


class Structures:
    """Which parameters reach at most one entry of their weights, decided once for each structure.

    To sum before squaring is right for any structure, so the verdict that a parameter needs it
    holds for the whole collection. The verdict that it does not holds as long as the weights are
    computed by the same graphs from equal constants. Verdicts are kept because to read one waits
    for a device.

    Args:
        in_lockstep: Whether several processes run a sharded model. They may decide differently, and
            must gather layers equally often. So a weight is only separate if its graph has saved no
            tensors, which would have to be gathered to lead gradients back.

    Attributes:
        in_lockstep: As above.
    """

    def __init__(self, *, in_lockstep: bool) -> None:
        self.in_lockstep = in_lockstep
        self._joint: set[str] = set()
        self._separate: dict[str, Description] = {}

    def joint(self, weights: Sequence[Weight], *, is_hooked: bool) -> set[str]:
        """The names of the parameters whose gradients must be summed before squaring.

        Args:
            weights: All effective weights that were used.
            is_hooked: Whether the model has registered hooks, which may change gradients.
        """
        by_name: dict[str, list[Weight]] = {}
        for weight in weights:
            for name in weight.parameters:
                by_name.setdefault(name, []).append(weight)
        made_of = {
            name: made
            for name, made in by_name.items()
            if len(made) > 1 or not made[0].is_parameter
        }
        undecided = {}
        for name, made in made_of.items():
            if name in self._joint:
                continue
            edges = [weight.edge for weight in made if not weight.is_parameter]
            needs_values = self.in_lockstep and keeps_tensors(edges)
            if len(edges) < len(made) or is_hooked or needs_values:
                self._joint.add(name)
                continue
            known = self._separate.get(name)
            graph = None if known is None else describe(edges)
            if known is None or graph is None or not known.equals(graph):
                undecided[name] = edges
        if undecided:
            separate = _separate(weights, undecided.keys())
            self._joint.update(undecided.keys() - separate)
            for name in separate:
                graph = describe(undecided[name])
                if graph is not None:
                    self._separate[name] = graph
        return self._joint & made_of.keys()


def lead_back(
    weights: Sequence[Weight],
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    batched: bool = False,
) -> list[Tensor | None]:
    """The gradients of parameters, `sum over weights of J^T g`; None where no weight depends on it.

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
    # vmap cannot do it, as with an autograd.Function of the user: one reverse pass per sample.
    rows = [grad(row, batched=False) for row in zip(*typed, strict=True)]
    columns = zip(*rows, strict=True)
    return [None if column[0] is None else torch.stack(column) for column in columns]


def _separate(weights: Sequence[Weight], names: Set[str]) -> set[str]:
    """The names of the parameters each entry of which reaches at most one entry of all weights."""
    holds: dict[str, list[Tensor]] = {name: [] for name in names}
    reached: dict[str, Tensor] = {}
    for weight in weights:
        own = {name: p for name, p in weight.parameters.items() if name in names}
        if not own:
            continue
        is_own_function = any(isinstance(n, BackwardCFunction) for n in nodes(weight.edge.node))
        if is_own_function or weight.layout.is_complex():
            # The user's reverse pass need not be linear; and J of complex numbers is not this J.
            names = names - own.keys()
            continue
        for name, verdicts in _tested(weight, own, reached).items():
            holds[name] += verdicts
    kept = [name for name in holds if name in names]
    if not kept:
        return set()
    verdicts = [torch.stack([*holds[name], (reached[name] <= 1).all()]).all() for name in kept]
    read = torch.stack([verdict.to(verdicts[0].device) for verdict in verdicts]).tolist()
    return {name for name, is_separate in zip(kept, read, strict=True) if is_separate}


def _tested(
    weight: Weight, parameters: Mapping[str, Tensor], reached: dict[str, Tensor]
) -> dict[str, list[Tensor]]:
    """Whether the identity holds between a weight and its parameters.

    The gradients have three scales, so that the identity fails if the reverse pass is not linear,
    as with a hook that clips gradients.

    Args:
        weight: The weight.
        parameters: The parameters by name.
        reached: By name, how many weights each entry has reached so far; it is updated.
    """
    holds: dict[str, list[Tensor]] = {name: [] for name in parameters}
    _, scale = _ranges(weight)
    negative = _back(weight, -torch.ones((), device=weight.device), parameters)
    slopes = {name: slope / -scale for name, slope in negative.items()}
    for name, slope in slopes.items():
        reached[name] = reached.get(name, 0) + (slope != 0).int()
    for v in _probes(weight):
        once = _back(weight, v / scale, parameters)
        twice = _back(weight, v * v * scale, parameters)
        for name, slope in slopes.items():
            # A difference that is not finite counts as not zero.
            holds[name].append(~((once[name] * scale) ** 2 - twice[name] * slope).any())
        if weight.device.type == "cpu" and not any(each[-1] for each in holds.values()):
            break
    return holds


def _back(weight: Weight, gradient: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`J^T g` by name, of a gradient that broadcasts to the weight.

    In float64, where the device has it: products of two small slopes underflow in float32, and two
    zeros are equal.
    """
    found = lead_back([weight], [gradient.expand(weight.layout.shape)], list(parameters.values()))
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    return {
        name: torch.zeros(p.shape, dtype=wide, device=p.device)
        if g is None
        else g.to_dense().to(wide)
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def _probes(weight: Weight) -> Iterator[Tensor]:
    """The vectors `v`: powers of two, so that any two entries differ in one vector at least.

    The exponents are the digits of an entry's index; in the last vector they count down, so that
    the differences of three entries do not cancel in all. Scaling by powers of two commutes with
    rounding: both sides of the identity are equal to the last bit, in half precision too.
    """
    index = torch.arange(weight.layout.numel(), device=weight.device, dtype=torch.int32)
    index = index.view(weight.layout.shape)
    bits, _ = _ranges(weight)
    bias = 127 - 2 ** (bits - 1)  # a float32 whose digits are zero is 2^(its higher bits - 127)
    for shift in range(0, weight.layout.numel().bit_length(), bits):
        yield ((index >> shift & (2**bits - 1)) + bias << 23).view(torch.float32)
    yield ((~index & (2**bits - 1)) + bias << 23).view(torch.float32)


def _ranges(weight: Weight) -> tuple[int, float]:
    """The bits of a digit, and a scale: `v / scale` and `v^2 * scale` are in the dtype's range."""
    is_wide = torch.finfo(weight.layout.dtype).max > 1e30
    return (6, 2.0**30) if is_wide else (2, 2.0**6)
