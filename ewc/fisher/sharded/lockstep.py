"""Runs a sharded model on several processes in lockstep.

To run one layer, all processes must gather it together. So all of them run the model equally
often, and a process without samples left runs a sample of the others that does not count. And all
decide alike which method a parameter takes: on the same first samples.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ewc.data.batch import Batch
from ewc.fisher.batches import Bundle, Reading
from ewc.fisher.comparison import differing, largest
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
        ranks: The processes.
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
        raw = None if own is None else (self._runner.read(own.raw, device=cpu).raw,)
        self._ranks.barrier("the first samples")
        found = self._ranks.first(raw)
        return None if found is None else self._runner.read(found[0], targets_required=False)

    def end_verification(self) -> None:
        """Forget which squares were not finite: the samples come again where they belong."""
        self._model.assume_finite()

    def bundles(
        self, reading: Reading, batches: Iterable[Batch], vectorised: Vectorised | None
    ) -> Iterator[Bundle | None]:
        """As many samples as fit in memory, for as long as any process has some."""
        pieces = self._pieces(batches, vectorised)
        piece = next(pieces, None)
        while self._ranks.barrier("the next samples", piece is not None):
            yield None if piece is None else Bundle.of_one(reading.place, piece)
            piece = next(pieces, None)

    def _pieces(self, batches: Iterable[Batch], vectorised: Vectorised | None) -> Iterator[Batch]:
        for batch in batches:
            size = 1
            if vectorised is not None and batch.vectorisable:
                # The loop takes single samples; a model that reads values may branch on them.
                alone = vectorised.fallback or vectorised.reads
                size = 1 if alone else vectorised.chunk_size(batch)
            for start in range(0, batch.size, size):
                yield batch.take(start, min(start + size, batch.size))

    def chunks(self, batch: Batch, vectorised: Vectorised | None) -> Iterator[Batch]:
        """The whole batch: one run on every process."""
        yield batch

    def adding_to(
        self, sums: Mapping[str, Tensor], *, is_counted: bool = True
    ) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Whole totals, which are added up over the processes as soon as a layer is finished."""
        return self._model.adding_to(sums, is_counted)

    def groups(self, divergence: DivergentBranches, batch: Batch) -> list[list[int]]:
        """None: other processes would not run these groups.

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
        self._ranks.barrier("the comparison")
        scales = self._ranks.maximum(torch.tensor(largest(expected), dtype=torch.float64))
        names = self._ranks.all_gather(differing(found, expected, scales.tolist(), is_half=is_half))
        return set().union(*names)

    def are_finite(self, sums: Mapping[str, Tensor]) -> Tensor:
        """For each sum, whether all squares of this process were finite.

        The sums hold those of other processes, too, which know in which batch theirs were found.
        """
        device = self._runner.device
        return torch.stack([self._model.finite[name].to(device) for name in sums])
