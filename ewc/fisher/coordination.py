"""What the processes of a collection do together, and in which order batches are run.

A collection is given one of two: `Independent` here, or `LockStep` of `fisher/sharded`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from ewc.data.batch import Batch
from ewc.fisher.batches import Bundle, Reading, bundled
from ewc.fisher.comparison import differing, largest
from ewc.fisher.paths.branches import DivergentBranches
from ewc.fisher.paths.vectorised import Vectorised

A_FEW = 4
"""So many runs for a batch, or samples for a branch, are not worth another method."""


class Coordination(Protocol):
    """What differs between one process and several that run a sharded model together."""

    is_lockstep: bool
    """Whether all processes run the model equally often, so that no run may be repeated."""

    def verification_batch(self, own: Batch | None) -> Batch | None:
        """The samples to verify the methods on, given the first ones of this process, if any."""
        ...

    def end_verification(self) -> None:
        """Go on to the samples that count."""
        ...

    def bundles(
        self, reading: Reading, batches: Iterable[Batch], vectorised: Vectorised | None
    ) -> Iterator[Bundle | None]:
        """What to run, one after the other; None for a run that does not count."""
        ...

    def chunks(self, batch: Batch, vectorised: Vectorised | None) -> Iterator[Batch]:
        """The parts of a batch that are run at once."""
        ...

    def adding_to(
        self, sums: Mapping[str, Tensor], *, is_counted: bool = True
    ) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Where the squares of a run are added, to end up in `sums`, if it is counted."""
        ...

    def groups(self, divergence: DivergentBranches, batch: Batch) -> list[list[int]]:
        """The samples that are run together where the model branches; none to run the loop."""
        ...

    def differing(
        self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, is_half: bool
    ) -> set[str]:
        """The names whose sums differ by more than rounding, in half precision or in full."""
        ...

    def are_finite(self, sums: Mapping[str, Tensor]) -> Tensor:
        """For each sum, whether all squares of this process were finite, `[len(sums)]`."""
        ...


class Independent:
    """Every process runs its own batches at its own pace; the sums are added up in the end."""

    is_lockstep = False

    def verification_batch(self, own: Batch | None) -> Batch | None:
        """This process's own samples."""
        return own

    def end_verification(self) -> None:
        """Nothing to do."""

    def bundles(
        self, reading: Reading, batches: Iterable[Batch], vectorised: Vectorised | None
    ) -> Iterator[Bundle | None]:
        """The batches, small ones bundled where all parameters go by rule or copy."""

        def capacity(batch: Batch) -> int:
            if vectorised is None or vectorised.fallback or not batch.vectorisable:
                return 0
            return vectorised.capacity(batch)

        return bundled(reading, batches, capacity)

    def chunks(self, batch: Batch, vectorised: Vectorised | None) -> Iterator[Batch]:
        """Equal parts that fit in memory."""
        start = 0
        while start < batch.size:
            size = batch.size if vectorised is None else vectorised.chunk_size(batch)
            stop = min(start + size, batch.size)
            yield batch.take(start, stop)
            start = stop

    def adding_to(
        self, sums: Mapping[str, Tensor], *, is_counted: bool = True
    ) -> AbstractContextManager[Mapping[str, Tensor]]:
        """The sums themselves."""
        return nullcontext(sums)

    def groups(self, divergence: DivergentBranches, batch: Batch) -> list[list[int]]:
        """The samples that agree; none if nearly every sample takes a branch of its own."""
        few = len(divergence.groups) <= max(batch.size / 2, A_FEW)
        return divergence.groups if few else []

    def differing(
        self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, is_half: bool
    ) -> set[str]:
        """The names whose sums differ by more than rounding."""
        return differing(found, expected, largest(expected), is_half=is_half)

    def are_finite(self, sums: Mapping[str, Tensor]) -> Tensor:
        """For each sum, whether its largest entry is finite; the sum of all may overflow."""
        device = next(iter(sums.values())).device
        tops = [(s.max() if s.numel() else s.sum()).to(device) for s in sums.values()]
        return torch.stack(tops).isfinite()
