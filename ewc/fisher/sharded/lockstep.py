"""A pass of several processes over a sharded model, in step.

To run one layer, all processes must gather it together. So all of them run the model equally
often: one that has no samples left goes on with a sample of the others, which does not count. And
all decide alike which path a parameter takes: on the same first samples.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ewc.data.batch import Batch
from ewc.fisher.accumulation import Pass
from ewc.fisher.bundle import Bundle
from ewc.fisher.paths.interception import Apart
from ewc.fisher.sharded.layers import Layers
from ewc.fisher.verification import differing, largest
from ewc.processes.layout import local
from ewc.processes.ranks import Ranks


class InStep(Pass):
    """`Pass` over a model whose layers are gathered when they are used.

    Args:
        layers: Runs the model.
        ranks: The processes that run it together.
        arguments: Those of `Pass`; the parameters are those of `layers`.
    """

    def __init__(self, layers: Layers, ranks: Ranks, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._layers = layers
        self._ranks = ranks
        self._counts = True
        self._trying = True
        self._early = frozenset(layers.stand_ins)
        restore = self._restore

        def restore_all() -> None:
            restore()
            layers.reset()

        self._restore = restore_all

    @override
    def over(self, batches: Iterable[Any], max_samples: int | None) -> bool:
        read = self._read(batches, max_samples)
        first = next(read, None)
        trial = self._shared(None if first is None else first.take(0, min(2, first.size)))
        if trial is None:
            return self._truncated
        self._try_out(trial)
        self._layers.assume_finite()  # the samples of the trial come again, where they belong
        self._trying = False
        pieces = self._pieces(read if first is None else chain([first], read))
        piece = next(pieces, None)
        while self._ranks.barrier("the next samples", piece is not None):
            self._counts = piece is not None
            self._add(trial.take(0, 1) if piece is None else piece)
            if piece is not None:
                self.samples += piece.size
                self._batches += 1
                self._refuse_non_finite(Bundle.of_one(self.place, piece))
                piece = next(pieces, None)
        self._refuse_non_finite(None)
        return self._truncated

    def _shared(self, own: Batch | None) -> Batch | None:
        """The samples of the first process that has some, for all."""
        raw = None if own is None else (self._reread(own.raw, torch.device("cpu")).raw,)
        self._ranks.barrier("the first samples")
        found = self._ranks.first(raw)
        return None if found is None else self._reread(found[0], self._device)

    def _reread(self, raw: Any, device: torch.device) -> Batch:
        return Batch.read(
            raw, batch_dim=self._likelihood.batch_dim, device=device, targets_required=False
        )

    def _pieces(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """As many samples at a time as all processes can do in one run of the model."""
        for batch in batches:
            fast = self._fast
            together = fast is not None and not fast.left_out and not fast.reads
            size = fast.limit(batch) if fast is not None and together and batch.vectorisable else 1
            for start in range(0, batch.size, size):
                yield batch.take(start, min(start + size, batch.size))

    @override
    def _add(self, batch: Batch) -> None:
        with self._adding_to(self.sums) as totals:
            slow = dict.fromkeys(self.sums, self._refusal)
            if self._fast is not None and batch.vectorisable:
                try:
                    self._reverse(self._record(self._fast, batch, totals))
                except Apart as apart:
                    raise ValueError(
                        "expected a model with sharded parameters to run alike on all samples; "
                        f"found that {apart}, as it did not for the first ones. Use batches of "
                        "one sample"
                    ) from apart
                slow = self._fast.left_out
            if slow:
                self._singly += batch.size
                for name in self._add_singly(batch, totals, set(slow), self._outputs, self._terms):
                    self.reasons.setdefault(name, slow[name])

    @override
    def _adding_to(
        self, target: Mapping[str, Tensor]
    ) -> AbstractContextManager[Mapping[str, Tensor]]:
        return self._layers.adding_to(target, self._counts)

    @override
    def _finite(self) -> Tensor:
        # The sums hold what the other processes found, too: it is theirs to say in which batch.
        return torch.stack([self._layers.finite[name].to(self._device) for name in self.sums])

    @override
    def _differing(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> set[str]:
        found = {name: local(each) for name, each in found.items()}
        expected = {name: local(each) for name, each in expected.items()}
        self._ranks.barrier("the comparison")
        scales = self._ranks.maximum(torch.tensor(largest(expected), dtype=torch.float64))
        names = self._ranks.all_gather(differing(found, expected, scales.tolist()))
        return set().union(*names)

    @override
    def _give_up(self, error: Exception, again: Any) -> None:
        if not self._trying:
            raise error
        super()._give_up(error, again)
