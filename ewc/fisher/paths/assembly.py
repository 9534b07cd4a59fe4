"""Computes the squared gradients of parameters from the gradients of their effective weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ewc.fisher.gradients import Dense, Gradient, add_square
from ewc.fisher.numerics import product_context
from ewc.fisher.paths.structure import Structures, lead_back
from ewc.fisher.paths.weights import Weight

SAMPLES_BYTES = 2**24
"""How much memory the per-sample gradients that are led back may take at a time."""


class Assembly:
    """One batch: receives gradients of weights, and adds up the squared gradients of parameters.

    A weight is *separate* if every entry of its parameters reaches at most one entry of all
    weights. Its gradients are squared as soon as they are complete, and the squares are led back at
    the end. Other weights are *joint*: their gradients are led back, some samples at a time, and
    summed over all weights of a parameter before squaring.

    Args:
        sums: For each parameter, where its squares are added.
        structures: Decides which weights are separate.

    Attributes:
        is_last: Whether no other reverse pass will follow the present one.
    """

    def __init__(self, sums: Mapping[str, Tensor], structures: Structures) -> None:
        self.is_last = False
        self._sums = sums
        self._structures = structures
        self._products = product_context()
        self._separate: set[Weight] = set()
        self._groups: list[list[Weight]] = []
        self._squares: dict[Weight, Tensor] = {}

    @property
    def joint_bytes(self) -> int:
        """The memory of the gradients of joint weights and of their parameters, for one sample."""
        weights = [weight for group in self._groups for weight in group]
        tensors = [*(weight.layout for weight in weights), *_parameters(weights).values()]
        return sum(each.numel() * each.element_size() for each in tensors)

    def begin(self, weights: Sequence[Weight], *, is_hooked: bool) -> None:
        """Decide which weights are separate, before the first reverse pass.

        Args:
            weights: All effective weights that were used.
            is_hooked: Whether the model has registered hooks.
        """
        joint = self._structures.joint(weights, is_hooked=is_hooked)
        self._separate = {each for each in weights if joint.isdisjoint(each.parameters)}
        self._groups = _connected([each for each in weights if each not in self._separate], joint)

    def receive(self, weight: Weight, gradient: Gradient) -> None:
        """Receive the gradient of one use of a weight."""
        if not weight.parameters:
            return  # its parameters fall back to the loop
        weight.received.append(gradient)
        if weight.is_complete and weight in self._separate:
            with self._products():
                self._square(weight)

    def end_reverse(self) -> None:
        """End one reverse pass: square what is not squared yet; no gradient comes after it."""
        with self._products():
            for weight in self._separate:
                if weight.received:
                    self._square(weight)
            for group in self._groups:
                self._square_sum([weight for weight in group if weight.received])

    def end(self) -> None:
        """End the batch: lead the squares of separate weights back to their parameters."""
        if not self._squares:
            return
        weights = list(self._squares)
        parameters = _parameters(weights)
        with self._products():
            gradients = self._lead_back(weights, parameters)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                add_square(self._sums[name], gradient)

    def _lead_back(
        self, weights: list[Weight], parameters: Mapping[str, Tensor]
    ) -> list[Tensor | None]:
        """`J^T sqrt(squares)`, of separate weights: no two of them reach the same entry."""
        roots = [self._squares.pop(weight).sqrt_() for weight in weights]
        rounded = [r.to(_narrowest(w)) for w, r in zip(weights, roots, strict=True)]
        values = list(parameters.values())
        found = lead_back(weights, rounded, values)
        if all(whole.dtype == root.dtype for whole, root in zip(rounded, roots, strict=True)):
            return found
        # A narrower dtype rounds: what it has cut off is led back too.
        remainders = [root - whole for whole, root in zip(rounded, roots, strict=True)]
        others = lead_back(weights, remainders, values)
        return [
            None if one is None or other is None else one.to(self._sums[name].dtype) + other
            for name, one, other in zip(parameters, found, others, strict=True)
        ]

    def _square(self, weight: Weight) -> None:
        """Add the squares of a separate weight, to be led back if it is not a parameter."""
        if weight.is_parameter:
            weight.take().add_squares(self._sums[weight.name])
            return
        if weight not in self._squares:
            wide = torch.promote_types(weight.layout.dtype, torch.float32)
            for name in weight.parameters:
                wide = torch.promote_types(wide, self._sums[name].dtype)
            self._squares[weight] = torch.empty_strided(
                weight.layout.shape, weight.layout.stride(), dtype=wide, device=weight.device
            ).zero_()
        weight.take().add_squares(self._squares[weight])

    def _square_sum(self, weights: list[Weight]) -> None:
        """Lead the gradients of joint weights back, some samples at a time, and add the squares."""
        if not weights:
            return
        parameters = _parameters(weights)
        gradients = [weight.take() for weight in weights]
        elements = sum(each.numel() for each in parameters.values()) + sum(
            max(weight.layout.numel(), gradient.elements_per_sample(weight.layout))
            for weight, gradient in zip(weights, gradients, strict=True)
        )
        samples = gradients[0].samples
        step = max(1, SAMPLES_BYTES // (weights[0].layout.element_size() * max(1, elements)))
        if self._structures.in_lockstep:
            step = samples  # all processes must lead back equally often, whatever their samples
        for start in range(0, samples, step):
            stop = min(start + step, samples)
            parts = [gradient.per_sample(start, stop) for gradient in gradients]
            for name, gradient in _summed(weights, parts, parameters).items():
                Dense(gradient).add_squares(self._sums[name])


def _summed(
    weights: Sequence[Weight], gradients: Sequence[Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The per-sample gradients of parameters, `[n, *shape]`, from those of their weights."""
    found: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor | None) -> None:
        if gradient is not None:
            found[name] = gradient if name not in found else found[name] + gradient

    made = [n for n, weight in enumerate(weights) if not weight.is_parameter]
    for weight, gradient in zip(weights, gradients, strict=True):
        if weight.is_parameter:
            add(weight.name, gradient)
    if made:
        back = lead_back(
            [weights[n] for n in made],
            [gradients[n] for n in made],
            list(parameters.values()),
            batched=True,
        )
        for name, led_back in zip(parameters, back, strict=True):
            add(name, led_back)
    return found


def _narrowest(weight: Weight) -> torch.dtype:
    """The dtype with the fewest digits, of a weight and its parameters."""
    dtypes = [weight.layout.dtype, *(each.dtype for each in weight.parameters.values())]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _parameters(weights: Sequence[Weight]) -> dict[str, Tensor]:
    return {name: each for weight in weights for name, each in weight.parameters.items()}


def _connected(weights: Sequence[Weight], names: set[str]) -> list[list[Weight]]:
    """Divide weights into groups; no two groups share one of the parameters `names`."""
    groups: list[tuple[list[Weight], set[str]]] = []
    for weight in weights:
        members, shared = [weight], names & weight.parameters.keys()
        rest = []
        for group in groups:
            if shared.isdisjoint(group[1]):
                rest.append(group)
            else:
                members, shared = [*group[0], *members], shared | group[1]
        groups = [*rest, (members, shared)]
    return [members for members, _ in groups]
