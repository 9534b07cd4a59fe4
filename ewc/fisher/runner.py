"""Runs the model of one collection by each of the methods; restores it after each run."""

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ewc._autocast import without_autocast
from ewc._options import FisherType
from ewc.data.advice import LABELS, missing_labels
from ewc.data.batch import Batch
from ewc.data.calling import Forward, apply
from ewc.data.lists import Known
from ewc.errors import InvalidBatch
from ewc.fisher import terms
from ewc.fisher.notes import calling, explaining
from ewc.fisher.numerics import full_precision, without_cudnn
from ewc.fisher.paths.loop import run_loop
from ewc.fisher.paths.replacements import replaced
from ewc.fisher.paths.vectorised import Outputs, Recorded, Terms, Vectorised
from ewc.likelihoods import Likelihood
from ewc.model.randomness import Randomness

T = TypeVar("T")


@dataclass(frozen=True)
class Runner:
    """A model, its parameters, and what is differentiated.

    Attributes:
        model: The model, in eval mode.
        parameters: The parameters to collect, by name.
        likelihood: Gives each sample's negative log-likelihood.
        forward: `forward(model, batch) -> outputs`; None calls the model on the inputs.
        fisher_type: `"empirical"`, `"exact"` or `"mc"`.
        randomness: The random numbers of the runs.
        restore: Undoes what a run has changed in the model.
        hooked: The names of the parameters whose gradients the loop squares in hooks, so that it
            does not hold them all: the placeholders of a sharded model.
        others: Modules outside the model that its runs may use.
        known: What the batches have shown about the lists in them.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    likelihood: Likelihood
    forward: Forward | None
    fisher_type: FisherType
    randomness: Randomness
    restore: Callable[[], None]
    hooked: Set[str] = frozenset()
    others: Sequence[nn.Module] = ()
    known: Known = field(default_factory=Known)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(iter(self.parameters.values())).device

    @property
    def samples_dim(self) -> int | None:
        """The dimension of the outputs with the samples; None to see one sample at a time."""
        return self.likelihood.batch_dim if self.likelihood.takes_batches else None

    def read(
        self, raw: Any, *, device: torch.device | None = None, targets_required: bool | None = None
    ) -> Batch:
        """Read a raw batch.

        Args:
            raw: The batch as the loader made it.
            device: Where its tensors are moved; by default to the device of the parameters.
            targets_required: Whether one bare tensor, which has no targets, is refused; by default
                if the empirical Fisher is collected.
        """
        if targets_required is None:
            targets_required = self.fisher_type == "empirical"
        if (
            targets_required
            and isinstance(raw, Mapping)
            and len(raw) > 0
            and LABELS not in raw
            and self.likelihood.needs_targets
        ):
            raise InvalidBatch(missing_labels(raw, self.model, self.likelihood.batch_dim))
        return Batch.read(
            raw,
            batch_dim=self.likelihood.batch_dim,
            device=self.device if device is None else device,
            targets_required=targets_required,
            known=self.known,
        )

    def outputs(self, raw: Any, samples: int = 1) -> tuple[Any, tuple[Any, ...]]:
        """Run the model: its outputs, and the other arguments of the likelihood."""
        with calling(samples), replaced:
            return apply(self.model, raw, self.forward, whole=self.known.inputs_are_whole)

    def terms(self, outputs: Any, rest: tuple[Any, ...], samples: int) -> Tensor:
        """What is differentiated, `[K, samples]`."""
        with calling(samples):
            return terms.terms(self.likelihood, self.fisher_type, outputs, rest, samples)

    def explaining(
        self, which: str, batch: Batch, *, may_run: bool = True
    ) -> AbstractContextManager[None]:
        """Explain the exceptions of model, forward and likelihood inside the context.

        Args:
            which: The batch or batches, as the loader counts them.
            batch: The batch, as the loader yielded it.
            may_run: Whether the model may be run once more.
        """
        run_whole = self._run_whole if may_run else None
        dtypes = {each.dtype for each in self.parameters.values()}
        return explaining(which, batch, run_whole, self.known, dtypes)

    def _run_whole(self, batch: Batch) -> None:
        try:
            with self.randomness.stream():
                self.terms(*self.outputs(batch.raw), batch.size)
        finally:
            self.restore()

    def repeatably(self, run: Callable[[], T]) -> tuple[T, list[Any]]:
        """Run something whose random numbers the next run draws again.

        Args:
            run: What to run.

        Returns:
            What it returns, and where the random stream stood at its end.
        """
        start = self.randomness.position
        try:
            with self.randomness.stream() as keep, full_precision():
                found = run()
                keep()
            return found, self.randomness.position
        finally:
            self.randomness.position = start
            self.restore()

    def record(self, vectorised: Vectorised, batch: Batch, sums: Mapping[str, Tensor]) -> Recorded:
        """Run forward on all samples at once; `reverse` must follow."""
        try:
            with self.randomness.stream() as keep, replaced:
                recorded = vectorised.forward(batch, sums)
                keep()
                return recorded
        except BaseException:
            self.restore()
            raise

    def reverse(self, recorded: Recorded) -> None:
        """Run the reverse passes that belong to a forward pass, and add the squares."""
        devices = {parameter.device.type for parameter in self.parameters.values()}
        try:
            with self.randomness.stream() as keep, torch.no_grad(), without_autocast(devices):
                recorded.reverse()
                keep()
        finally:
            # Not earlier: the graph may have saved a buffer that the model has written to.
            self.restore()

    def loop(
        self,
        batch: Batch,
        sums: Mapping[str, Tensor],
        names: Set[str],
        *,
        outputs: Outputs | None = None,
        terms: Terms | None = None,
    ) -> set[str]:
        """Run forward and reverse on one sample at a time, and add the squares.

        Args:
            batch: The samples.
            sums: For each parameter, where its squares are added.
            names: The parameters to differentiate by.
            outputs: Runs the model; by default the runner's own `outputs`.
            terms: What is differentiated; by default the runner's own `terms`.

        Returns:
            The names of the parameters that a gradient reached.
        """
        parameters = {name: each for name, each in self.parameters.items() if name in names}
        run, differentiated = outputs or self.outputs, terms or self.terms

        def of_one(raw: Any) -> Tensor:
            return differentiated(*run(raw), 1).squeeze(1)

        with self.randomness.stream() as keep, without_cudnn:
            reached = run_loop(
                batch, parameters, sums, of_one, self.restore, hooked=self.hooked & names
            )
            keep()
            return reached
