"""Runs a sharded model on several processes in lockstep.

Gathering a layer is a collective, so all processes must run the model equally often. A process that
has no samples left runs one that does not count. All processes verify the methods on the same
samples, so that each parameter takes the same method on all of them.
"""

import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ewc.data.batch import Batch
from ewc.fisher.batches import Bundle, Reading
from ewc.fisher.comparison import differing, largest
from ewc.fisher.coordination import InUse
from ewc.fisher.paths.branches import DivergentBranches
from ewc.fisher.paths.vectorised import Vectorised
from ewc.fisher.runner import Runner
from ewc.fisher.sharded.model import ShardedModel
from ewc.processes.layout import local
from ewc.processes.ranks import Ranks


class LockStep:
    """The `Coordination` of several processes whose model is sharded.

    Args:
        model: Gathers the layers.
        ranks: The processes that run it.
        runner: Reads the samples that the processes share.
    """

    is_lockstep = True

    def __init__(self, model: ShardedModel, ranks: Ranks, runner: Runner) -> None:
        self._model = model
        self._ranks = ranks
        self._runner = runner

    def verification_batch(self, own: Batch | None) -> Batch | None:
        """The first samples of the first process that has some, for all."""
        cpu = torch.device("cpu")
        known = self._runner.known.decided
        raw = None if own is None else (self._runner.read(own.raw, device=cpu).raw, known)
        try:
            found = self._ranks.first("the first samples", raw)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                "The first samples must be picklable, as all processes of a model with sharded "
                f"parameters verify the methods on them; found {type(error).__name__}: {error}. "
                "Fix: leave that object out of the batches, or define its class in a module."
            ) from error
        if found is None:
            return None
        known.update(found[1])
        return self._runner.read(found[0], targets_required=False)

    def end_verification(self) -> None:
        """Reset which squares were finite; the first samples are run again in their batch."""
        self._model.assume_finite()

    def bundles(
        self, reading: Reading, batches: Iterable[Batch], vectorised: InUse
    ) -> Iterator[Bundle | None]:
        """Parts of batches that fit in memory, as long as any process has samples."""
        pieces = self._pieces(batches, vectorised())
        piece = next(pieces, None)
        while self._ranks.barrier("the next samples", piece is not None):
            yield None if piece is None else Bundle.of_one(reading.index, piece)
            piece = next(pieces, None)

    def _pieces(self, batches: Iterable[Batch], vectorised: Vectorised | None) -> Iterator[Batch]:
        for batch in batches:
            size = 1
            if vectorised is not None and batch.vectorisable:
                # The loop runs single samples; samples of a model that reads values may branch.
                is_single = vectorised.fallback or vectorised.reads
                size = 1 if is_single else vectorised.chunk_size(batch)
            for start in range(0, batch.size, size):
                yield batch.take(start, min(start + size, batch.size))

    def chunks(self, batch: Batch, vectorised: InUse) -> Iterator[Batch]:
        """The whole batch: one run on every process."""
        yield batch

    def adding_to(
        self, sums: Mapping[str, Tensor], *, is_counted: bool = True
    ) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Whole sums of this process, added up over the processes when a layer is finished."""
        return self._model.adding_to(sums, is_counted)

    def before_retry(self, error: Exception) -> None:
        """Raise the error, unless all processes have met one: no run may be repeated alone."""
        self._ranks.agree_on_error(error)

    def groups(self, divergence: DivergentBranches, batch: Batch) -> list[list[int]]:
        """Refuse to run groups, because other processes would not run them.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "A model with sharded parameters must run alike on all samples of a batch; found that "
            f"{divergence}, which did not show on the first samples. Fix: use batches of one "
            "sample."
        ) from divergence

    def differing(
        self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, is_half: bool
    ) -> set[str]:
        """The names whose sums differ by more than rounding, on any process."""
        found = {name: local(each) for name, each in found.items()}
        expected = {name: local(each) for name, each in expected.items()}
        own = torch.tensor(largest(expected), dtype=torch.float64)
        with self._ranks.exchange("the largest sums"):
            scales = self._ranks.maximum(own).tolist()
        names = differing(found, expected, scales, is_half=is_half)
        return set().union(*self._ranks.gather("the names that differ", names))

    def are_finite(self, sums: Mapping[str, Tensor]) -> Tensor:
        """For each sum, whether all squares of this process were finite.

        `sums` cannot tell: they hold the squares of other processes, too, of other batches.
        """
        device = self._runner.device
        return torch.stack([self._model.finite[name].to(device) for name in sums])
