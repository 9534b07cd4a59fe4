"""What likelihoods of independent positions share: which positions count, and the sums over them.

A position is a pixel, a token or an output dimension. `Classification` and `Regression` say what
one position contributes; `TimeSeries` runs them with the steps of a sequence as samples. All of
it works inside `torch.func.vmap`, and reads values from the device once per call.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from ewc._vmap import peek
from ewc.data.structures import describe
from ewc.errors import InvalidBatch
from ewc.likelihoods.likelihood import Likelihood

TargetTransform: TypeAlias = Callable[[Any], Tensor]


class Fault(NamedTuple):
    """What may be wrong with the values in a batch: where it is, and what to say about it."""

    where: Tensor
    message: Callable[[], str]


class Reading(NamedTuple):
    """The targets of n samples, their shapes validated."""

    targets: Tensor  # as `_losses` takes them
    counts: Tensor | None  # [n] or [n, *positions], boolean; None: every position counts
    fault: Fault


class _Observed(NamedTuple):
    """A batch of n samples, its values validated, safe to compute on where they do not count."""

    head: Tensor
    targets: Tensor | None
    weights: Tensor | None  # [n] or [n, *positions]; None: every position counts once


class Pointwise(Likelihood):
    """A likelihood of positions that are independent given the outputs."""

    target_transform: TargetTransform | None

    @abstractmethod
    def _head(self, outputs: Any) -> Tensor:
        """The outputs that targets count over, `[n, *positions]` or `[n, C, *positions]`."""

    @abstractmethod
    def _read(self, head: Tensor, targets: Tensor, counts: Tensor | None) -> Reading:
        """Read targets; `counts` (`[n]`) says which samples may hold anything."""

    @abstractmethod
    def _losses(self, head: Tensor, targets: Tensor) -> Tensor:
        """The NLL of each position, `[n, *positions]`."""

    @abstractmethod
    def _draw(self, head: Tensor) -> Tensor:
        """Targets drawn given a detached head, as `_losses` takes them."""

    @abstractmethod
    def _terms(self, head: Tensor) -> Tensor:
        """The exact terms of each position, `[K, n, *positions]`."""

    @override
    def nll(self, outputs: Any, *rest: Any) -> Tensor:
        return self.weighted_nll(outputs, self.targets_in(rest, required=True), None)

    @override
    def sample(self, outputs: Any) -> Tensor:
        return self._draw(self._head(outputs).detach())

    @override
    def sampled_nll(self, outputs: Any, *rest: Any) -> Tensor:
        return self.weighted_sampled_nll(outputs, self.targets_in(rest, required=False), None)

    @override
    def exact_terms(self, outputs: Any, *rest: Any) -> Tensor:
        return self.weighted_exact_terms(outputs, self.targets_in(rest, required=False), None)

    def targets_in(self, rest: tuple[Any, ...], *, required: bool) -> Tensor | None:
        """The targets of a batch, transformed; None if it has none.

        Raises:
            InvalidBatch: It has none, but they are required; or they are not a tensor.
        """
        name = type(self).__name__
        targets = rest[0] if rest else None
        if targets is None:
            if required:
                raise InvalidBatch(
                    f"{name} needs the targets of a batch, which follow its inputs; found none. "
                    "Mend: yield (inputs, targets), or a mapping with 'labels'; or take "
                    'fisher_type="exact" or "mc", which need none.'
                )
            return None
        if self.target_transform is not None:
            targets = self.target_transform(targets)
        if not isinstance(targets, Tensor):
            source = "the batch" if self.target_transform is None else "target_transform"
            raise InvalidBatch(
                f"{name} needs targets that are one tensor; found {describe(targets)} from "
                f"{source}. Mend: stack them in the loader, or pick them in target_transform."
            )
        return targets

    def weighted_nll(self, outputs: Any, targets: Tensor | None, weights: Tensor | None) -> Tensor:
        """The NLL `[n]` of n samples, each times its weight.

        Args:
            outputs: The model's outputs for n samples.
            targets: What `targets_in` returned.
            weights: `[n]`, boolean or >= 0. Where it is 0, outputs and targets may hold anything.
        """
        observed = self._observe(outputs, targets, weights)
        assert observed.targets is not None  # `targets_in` required them
        return _total(self._losses(observed.head, observed.targets), observed.weights)

    def weighted_sampled_nll(
        self, outputs: Any, targets: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        """As `weighted_nll`, of drawn targets; the given ones say which positions count."""
        observed = self._observe(outputs, targets, weights)
        drawn = self._draw(observed.head.detach())
        return _total(self._losses(observed.head, drawn), observed.weights)

    def weighted_exact_terms(
        self, outputs: Any, targets: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        """The exact terms `[K, n]`; the given targets say which positions count."""
        observed = self._observe(outputs, targets, weights)
        terms = self._terms(observed.head)
        if observed.weights is not None:
            terms = terms * spread(observed.weights, terms[0])
        if terms.dim() == 2:
            return terms
        return terms.flatten(2).transpose(1, 2).flatten(0, 1)

    def _observe(self, outputs: Any, targets: Tensor | None, weights: Tensor | None) -> _Observed:
        """Validate the values of a batch, and take out those that do not count."""
        head = self._head(outputs)
        counts: Tensor | None = None
        faults: list[Fault] = []
        if weights is not None:
            faults.append(_bad_weights(weights))
            counts = weights > 0
        if targets is not None:
            targets, counts, fault = self._read(head, targets, counts)
            faults.append(fault)
        uncounted = [] if counts is None else [~counts]
        answers = _anywhere([fault.where for fault in faults] + uncounted)
        for fault, found in zip(faults, answers, strict=False):
            if found:
                raise InvalidBatch(f"{type(self).__name__}: {fault.message()}")
        if weights is not None:
            weights = None if weights.dtype == torch.bool else weights.to(head.dtype)
        if counts is not None and answers[-1]:
            # Taken out before anything is computed: 0 * NaN is not 0, and nor is its gradient.
            head = torch.where(spread(counts, head), head, 0)
            if targets is not None:
                targets = torch.where(spread(counts, targets), targets, 0)
            counted = counts.to(head.dtype)
            weights = counted if weights is None else counted * spread(weights, counted)
        return _Observed(head, targets, weights)


def spread(values: Tensor, over: Tensor) -> Tensor:
    """`[n, *positions]` as `[n, 1, ..., *positions]`, with as many dimensions as `over`."""
    ones = (1,) * (over.dim() - values.dim())
    return values.reshape(*values.shape[:1], *ones, *values.shape[1:])


def _total(losses: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted sum of `[n, *positions]` over positions, `[n]`."""
    if weights is not None:
        losses = losses * spread(weights, losses)
    return losses.flatten(1).sum(1) if losses.dim() > 1 else losses


def _anywhere(conditions: list[Tensor]) -> list[bool]:
    """Whether each condition holds anywhere in the batch: one synchronisation, also in vmap."""
    if not conditions:
        return []
    answers: list[bool] = torch.stack([peek(where).any() for where in conditions]).tolist()
    return answers


def _bad_weights(weights: Tensor) -> Fault:
    if weights.is_complex():
        raise InvalidBatch(f"a mask must be boolean or real weights; found {describe(weights)}.")
    return Fault(
        ~(weights >= 0) | weights.isinf(),
        lambda: "weights in a mask must be finite and >= 0; found others. Mend: the mask.",
    )
