"""How processes cooperate in a collection, and in which parts their batches are run.

There are two ways: `Independent` here, and `LockStep` of `fisher/sharded` for sharded models.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from ewc._scalars import largest_entry
from ewc.data.batch import Batch
from ewc.fisher.batches import Bundle, Reading, bundled
from ewc.fisher.comparison import differing, largest
from ewc.fisher.paths.branches import DivergentBranches
from ewc.fisher.paths.vectorised import Vectorised
from ewc.processes.ranks import SINGLE_PROCESS, Ranks

A_FEW = 4
"""Up to this many runs of single samples for a batch, or groups of samples, are not slow."""


InUse = Callable[[], Vectorised | None]
"""Gives the fast methods that are in use now; None if all parameters fall back to the loop."""


class Coordination(Protocol):
    """What differs between one process and several that run a sharded model together."""

    is_lockstep: bool
    """Whether all processes run the model equally often, so that no run may be repeated."""

    def verification_batch(self, own: Batch | None) -> Batch | None:
        """The samples to verify the methods on, given the first ones of this process, or None."""
        ...

    def end_verification(self) -> None:
        """Go on to the samples that count."""
        ...

    def bundles(
        self, reading: Reading, batches: Iterable[Batch], vectorised: InUse
    ) -> Iterator[Bundle | None]:
        """The bundles to run, in order; None for a run that does not count."""
        ...

    def chunks(self, batch: Batch, vectorised: InUse) -> Iterator[Batch]:
        """The parts of a batch that are run at once."""
        ...

    def adding_to(
        self, sums: Mapping[str, Tensor], *, is_counted: bool = True
    ) -> AbstractContextManager[Mapping[str, Tensor]]:
        """The sums to which a run adds, as a context; added to `sums` at its end, if counted."""
        ...

    def before_retry(self, error: Exception) -> None:
        """Called before a run that has failed is repeated; raises the error to refuse that."""
        ...

    def groups(self, divergence: DivergentBranches, batch: Batch) -> list[list[int]]:
        """The groups of samples to run where the model branches; no group to run the loop."""
        ...

    def differing(
        self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, is_half: bool
    ) -> set[str]:
        """The names whose sums differ by more than rounding; overwrites `found`.

        Args:
            found: Sums by name.
            expected: What they should be.
            is_half: Whether the model computes in half precision.
        """
        ...

    def are_finite(self, sums: Mapping[str, Tensor]) -> Tensor:
        """For each sum, whether all squares of this process were finite, `[len(sums)]`."""
        ...


class Independent:
    """Every process runs its own batches at its own pace; `collect` adds up the sums at the end.

    Args:
        ranks: The processes. Each looks now and then whether another one has failed.
    """

    is_lockstep = False

    def __init__(self, ranks: Ranks = SINGLE_PROCESS) -> None:
        self._ranks = ranks

    def verification_batch(self, own: Batch | None) -> Batch | None:
        """This process's own samples."""
        return own

    def end_verification(self) -> None:
        """Nothing to do."""

    def bundles(
        self, reading: Reading, batches: Iterable[Batch], vectorised: InUse
    ) -> Iterator[Bundle | None]:
        """The batches, small ones bundled if no parameter falls back to the loop."""

        def capacity(batch: Batch) -> int:
            methods = vectorised()
            if methods is None or methods.fallback or not batch.vectorisable:
                return 0
            return methods.capacity(batch)

        return bundled(reading, self._looking_for_failures(batches), capacity)

    def chunks(self, batch: Batch, vectorised: InUse) -> Iterator[Batch]:
        """Equal parts that fit in memory."""
        start = 0
        while start < batch.size:
            self._ranks.look_for_failures()
            methods = vectorised()
            size = batch.size if methods is None else methods.chunk_size(batch)
            stop = min(start + size, batch.size)
            yield batch.take(start, stop)
            start = stop

    def _looking_for_failures(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._ranks.look_for_failures()
            yield batch

    def adding_to(
        self, sums: Mapping[str, Tensor], *, is_counted: bool = True
    ) -> AbstractContextManager[Mapping[str, Tensor]]:
        """The sums themselves."""
        return nullcontext(sums)

    def before_retry(self, error: Exception) -> None:
        """Every process may repeat its runs."""

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
        """For each sum, whether its largest entry is finite: to add them up may overflow."""
        device = next(iter(sums.values())).device
        tops = [largest_entry(each).to(device) for each in sums.values()]
        return torch.stack(tops).isfinite()
