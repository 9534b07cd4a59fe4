"""Finds a likelihood whose value for a sample depends on other samples.

The Fisher information is a mean over independent samples, each with a negative log-likelihood of
its own. A contrastive loss, weights taken from the classes of a batch, or a baseline that is its
mean compare samples: alone, a sample has another loss, or none.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ewc._refusals import unless_refused
from ewc.data.batch import Batch
from ewc.data.structures import children, is_scalar, rebuild
from ewc.fisher.mixing import samples_dim
from ewc.fisher.numerics import is_half_precision
from ewc.fisher.runner import Runner
from ewc.fisher.terms import values
from ewc.likelihoods import Custom, Likelihood
from ewc.likelihoods.likelihood import redefines

_DRAWS = 4
"""How often targets are drawn: weights of classes differ only where the classes do."""


class _NoSamples(Exception):  # noqa: N818 - a condition, not an error: as StopIteration
    """The outputs cannot be divided into samples."""


def refuse_comparing(runner: Runner, batch: Batch, both: Any, first: Any) -> None:
    """Refuse a likelihood whose value for a sample depends on the other samples of its batch.

    Of the two samples `a` and `b`, the batches `(a, a, b)` and `(a, b, b)` are made. Operations on
    equal shapes round equally, and draw the same random numbers. So the value for `a` is the same
    in both, and so is that for `b`, unless samples are compared. A likelihood that cannot be run on
    three samples, or whose values change from call to call, is not judged.

    Args:
        runner: Runs the model.
        batch: The two samples.
        both: The outputs of the model for both as one batch.
        first: Its outputs for the first sample alone, whose shapes say where the samples are.

    Raises:
        ValueError: The likelihood compares samples.
    """
    likelihood = runner.likelihood
    is_own = type(likelihood).__module__.startswith("ewc.") and not isinstance(likelihood, Custom)
    if is_own and likelihood.takes_batches:
        return
    threes = _Threes(runner, batch, both, first)
    for draw in range(threes.draws):
        # The loop has just run the likelihood on single samples; it may take nothing else.
        if unless_refused(partial(threes.compare, draw)):
            raise ValueError(_message(runner))


class _Threes:
    """Runs a likelihood on batches of three samples that are made of two.

    Args:
        runner: Runs the model.
        batch: The two samples.
        both: The outputs of the model for both.
        first: Those for the first.

    Attributes:
        draws: How often to draw targets.
    """

    def __init__(self, runner: Runner, batch: Batch, both: Any, first: Any) -> None:
        self._runner, self._batch, self._both, self._first = runner, batch, both, first
        is_drawn = runner.fisher_type == "mc"
        # Else a target belongs to a place in the batch, not to a sample.
        self._draws = is_drawn and not redefines(runner.likelihood, Likelihood, "sampled_nll")
        self.draws = _DRAWS if self._draws else 1
        self._tolerance = 0.05 if is_half_precision(runner.model) else 1e-4

    def compare(self, draw: int) -> bool:
        """Whether the likelihood compares samples, with one draw of the targets."""
        targets = self._targets(draw) if self._draws else None
        one, position = self._values(targets, 0, 0, 1)
        other, end = self._values(targets, 0, 1, 1)
        if one.shape[-1:] == (3,):
            is_same = self._close(one[..., [0, 2]], other[..., [0, 2]])
        else:  # reduced over samples: a sum or a mean of independent values is additive
            (first, _), (second, _) = (self._values(targets, n, n, n) for n in range(2))
            is_same = self._close(3 * one, 2 * first + second)
        if is_same:
            return False
        again, _ = self._values(targets, 0, 0, 1)
        return torch.equal(one, again) and all(map(torch.equal, position, end))

    def _targets(self, draw: int) -> tuple[Any, Any]:
        """Targets for both samples and, to know where these are, for the first."""

        def run() -> tuple[Any, Any]:
            torch.rand(draw, device=self._runner.device)  # other targets are drawn after it
            sample = self._runner.likelihood.sample
            return sample(self._both), sample(self._first)

        with torch.no_grad():
            return self._runner.repeatably(run)[0]

    def _values(self, targets: tuple[Any, Any] | None, *samples: int) -> tuple[Tensor, list[Any]]:
        """The values for a batch of some samples, and where the random stream stood after it."""
        runner, part = self._runner, self._batch.pick(samples)

        def run() -> Tensor:
            try:
                outputs, rest = _select(self._both, self._first, samples), part.rest
            except _NoSamples:
                outputs, rest = runner.outputs(part.raw, part.size)
            if targets is not None:
                drawn = _select(*targets, samples)
                return runner.likelihood.nll(outputs, drawn, *rest[1:]).detach()
            found: Tensor = values(runner.likelihood, runner.fisher_type, outputs, rest)
            return found.detach()

        return runner.repeatably(run)

    def _close(self, one: Tensor, other: Tensor) -> bool:
        scale = one[one.isfinite()].abs().max().item() if bool(one.isfinite().any()) else 0.0
        return torch.allclose(one, other, rtol=0, atol=self._tolerance * scale, equal_nan=True)


def _select(both: Any, first: Any, samples: tuple[int, ...]) -> Any:
    """The outputs for a batch of some of the two samples, from those for both.

    Raises:
        _NoSamples: They hold an object that cannot be divided.
    """
    if isinstance(both, Tensor) and isinstance(first, Tensor):
        if both.shape == first.shape:
            return both  # shared by the samples
        dim = samples_dim(both, first)
        if dim is None:
            raise _NoSamples
        size = first.shape[dim]
        return torch.cat([both.narrow(dim, n * size, size) for n in samples], dim)
    items, others = children(both), children(first)
    if items is not None and others is not None and len(items) == len(others):
        return rebuild(both, [_select(*pair, samples) for pair in zip(items, others, strict=True)])
    if is_scalar(both):
        return both
    raise _NoSamples


def _message(runner: Runner) -> str:
    likelihood = runner.likelihood
    name = (
        f"{type(likelihood).__name__}.{'exact_terms' if runner.fisher_type == 'exact' else 'nll'}"
    )
    if isinstance(likelihood, Custom):
        name += f" ({getattr(likelihood.function, '__qualname__', 'a function')})"
    return (
        "The negative log-likelihood of a sample must not depend on the other samples of its "
        f"batch; found that {name} compares them. Fix: let several samples be one, a batch "
        "[1, B, d] for a loss over B samples; compute what the loss takes from a batch (class "
        "weights, a baseline, negatives) before the consolidation, or yield it with the batch."
    )
