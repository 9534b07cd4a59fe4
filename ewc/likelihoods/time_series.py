"""Sequences of steps that are independent given the outputs."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from ewc._options import FisherType
from ewc.data.structures import describe
from ewc.errors import InvalidBatch
from ewc.likelihoods.classification import Classification
from ewc.likelihoods.extras import read_masks, restrict
from ewc.likelihoods.heads import real_tensor
from ewc.likelihoods.likelihood import Likelihood, redefines
from ewc.likelihoods.pointwise import Pointwise

# `TimeSeries` calls the methods of its step that these are made of, and so would ignore a step's
# own definition of one of these.
_SUMS = ("nll", "sample", "sampled_nll", "exact_terms")


class TimeSeries(Likelihood, takes_batches=True):
    """The likelihood of a sequence: the NLL of a step, summed over time.

    Outputs are `[S, N, F]`: S steps, N samples, F outputs per step. Targets are those of the step
    likelihood with the dimensions of time and samples in front: `[S, N]` or `[S, N, F]`. With
    `batch_first`, all of these are `[N, S, ...]`.

    A 2-D tensor `[S, N]` right after the targets is a mask: booleans, or weights >= 0 that multiply
    the negative log-likelihood (NLL) of a step. Where it is 0, outputs and targets may hold any
    values. Other boolean tensors after the targets are masks as well, of the shape `[S, N]` or that
    of all positions (`[S, N, F]` for `Regression`). 1-D integers (ids, lengths) are ignored.

    The exact Fisher information is the sum of the exact Fisher information of all steps.

    Args:
        step: The likelihood of one step, on outputs `[n, F]`: a `Classification` (the default), a
            `Regression`, a `Bernoulli`, or another `Pointwise`. Its `target_transform` is called on
            the targets of whole sequences.
        batch_first: Whether the dimension of the samples comes before that of time.

    Raises:
        TypeError: `step` is not a `Pointwise`, or defines `nll` instead of `position_nll`.

    Example:
        Two sequences of up to three steps; the second one has a single step:

        >>> likelihood = TimeSeries(Regression(), batch_first=True)
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> likelihood.nll(torch.zeros(2, 3, 4), torch.ones(2, 3, 4), mask)
        tensor([6., 2.])
    """

    def __init__(self, step: Pointwise | None = None, *, batch_first: bool = False) -> None:
        step = Classification() if step is None else step
        if not isinstance(step, Pointwise) or redefines(step, Pointwise, *_SUMS):
            raise TypeError(
                "step must be a Classification, a Bernoulli, a Regression or another Pointwise "
                f"that defines position_nll and not {', '.join(_SUMS[:-1])} or {_SUMS[-1]}; found "
                f"{step!r}. "
                "Fix: define position_nll; or a Likelihood with batch_dim = 1 (0 if the samples "
                "come first) that sums over time itself."
            )
        if not isinstance(batch_first, bool):
            raise TypeError(f"batch_first must be True or False; found {batch_first!r}.")
        self.step = step
        self.batch_first = batch_first
        self.batch_dim = 0 if batch_first else 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.step}, batch_first={self.batch_first})"

    @property
    @override
    def takes_batches(self) -> bool:
        return super().takes_batches and self.step.takes_batches

    @override
    def supports(self, fisher_type: FisherType) -> bool:
        return self.step.supports(fisher_type)

    @override
    def _undefined(self, fisher_type: FisherType) -> str:
        return self.step._undefined(fisher_type)

    @property
    @override
    def needs_targets(self) -> bool:
        return super().needs_targets or not redefines(self, TimeSeries, "nll")

    @override
    def nll(self, outputs: Any, *rest: Any) -> Tensor:
        nll = self.step.weighted_nll(*self._steps(outputs, rest, required=True))
        return self._over_time(nll, outputs)

    @override
    def sample(self, outputs: Any, /) -> Tensor:
        drawn = self.step.sample(self._steps(outputs, (), required=False)[0])
        return drawn.reshape(*outputs.shape[:2], *drawn.shape[1:])

    @override
    def sampled_nll(self, outputs: Any, /, *rest: Any) -> Tensor:
        nll = self.step.weighted_sampled_nll(*self._steps(outputs, rest, required=False))
        return self._over_time(nll, outputs)

    @override
    def exact_terms(self, outputs: Any, *rest: Any) -> Tensor:
        terms = self.step.weighted_exact_terms(*self._steps(outputs, rest, required=False))
        terms = terms.reshape(len(terms), *outputs.shape[:2])
        return (terms.transpose(1, 2) if self.batch_first else terms).flatten(0, 1)

    def _over_time(self, nll: Tensor, outputs: Tensor) -> Tensor:
        return nll.reshape(outputs.shape[:2]).sum(1 - self.batch_dim)

    def _steps(
        self, outputs: Any, rest: tuple[Any, ...], *, required: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Outputs, targets and mask, the first two dimensions as one: steps are the samples."""
        outputs = real_tensor(outputs, type(self).__name__)
        if outputs.dim() != 3:
            raise InvalidBatch(
                f"the outputs that TimeSeries takes must be [{self._order}, F]; found "
                f"{describe(outputs)}. Fix: change the model's outputs in forward."
            )
        targets = self.step.targets_in(rest, required=required)
        if targets is not None and targets.shape[:2] != outputs.shape[:2]:
            raise InvalidBatch(
                f"the targets that TimeSeries takes must be [{self._order}] or [{self._order}, F] "
                f"for outputs {list(outputs.shape)}; found {describe(targets)}. Fix: reshape "
                f"them in target_transform, or use TimeSeries(batch_first={not self.batch_first})."
            )
        steps = outputs.flatten(0, 1)
        return (
            steps,
            None if targets is None else targets.flatten(0, 1),
            self._weights_in(rest, outputs, steps),
        )

    def _weights_in(self, rest: tuple[Any, ...], outputs: Tensor, steps: Tensor) -> Tensor | None:
        """The mask or weights of the steps, `[S * N]` or `[S * N, *positions]`."""
        order = list(outputs.shape[:2])
        extras = list(rest[1:])
        weights: Tensor | None = None
        if extras and isinstance(extras[0], Tensor) and extras[0].dim() == 2:
            if list(extras[0].shape) != order:
                raise InvalidBatch(
                    f"the mask that TimeSeries takes must be [{self._order}] for outputs "
                    f"{list(outputs.shape)}; found {describe(extras[0])}. Fix: reshape it. "
                    "If it is not a mask, leave it out: a tensor of two dimensions right after the "
                    "targets is read as one."
                )
            weights = extras[0].flatten()
            extras[0] = None

        def shapes() -> list[list[int]]:
            positions = [*order, *self.step.positions(self.step.head(steps))[1:]]
            return [order] if positions == order else [order, positions]

        for mask in read_masks(extras, shapes, type(self).__name__):
            weights = restrict(weights, mask.flatten(0, 1))
        return weights

    @property
    def _order(self) -> str:
        return "N, S" if self.batch_first else "S, N"
