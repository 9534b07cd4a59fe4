"""Batches on their way into the model: read from the loader, and bundled if they are small.

What a sample contributes to the Fisher information has nothing to do with its batch, while every
run of a model has a cost that does not depend on the batch size, and for a small model it
dominates. So consecutive small batches are run as one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from torch.utils.data import DataLoader

from ewc.data.batch import Batch
from ewc.errors import InvalidBatch

BUNDLED_SHARE = 2
"""A bundle holds at most 1 / BUNDLED_SHARE of the samples that fit in memory: it stays in cache."""


class Reading:
    """Reads batches from a loader, up to a number of samples.

    Args:
        batches: Any iterable of raw batches.
        max_samples: The largest number of samples, or None for all.
        read: Turns a raw batch into a `Batch`.
        restore: Called before a batch is yielded, because a loader may run the model, too.

    Attributes:
        index: The index of the present batch in the loader, counted from 0.
        truncated: Whether `max_samples` ended the pass before the data did.
        may_read_ahead: Whether batches may be read ahead. An iterable that is neither a sequence
            nor a `DataLoader` may run code between two batches that the model's outputs depend on.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        max_samples: int | None,
        read: Callable[[Any], Batch],
        restore: Callable[[], None],
    ) -> None:
        self.index = 0
        self.truncated = max_samples == 0
        self.may_read_ahead = isinstance(batches, (Sequence, DataLoader))
        self._batches = batches
        self._left = max_samples
        self._read = read
        self._restore = restore

    def __iter__(self) -> Iterator[Batch]:
        """The batches that hold samples."""
        if self.truncated:
            return
        for index, raw in enumerate(self._batches):
            self.index = index
            with naming(index):
                batch = self._read(raw)
            if self._left is not None:
                if batch.size > self._left:
                    batch, self.truncated = batch.take(0, self._left), True
                self._left -= batch.size
            is_last = self._left == 0 and not _is_last(self._batches, index)
            self.truncated = self.truncated or is_last
            if batch.size:
                self._restore()
                yield batch
            if self._left == 0:
                return


class Bundle:
    """Consecutive batches that are run as one.

    Attributes:
        size: The number of samples.
        indices: The indices of the batches in the loader, counted from 0.
        batches: The batches.
    """

    def __init__(self) -> None:
        self.size = 0
        self.indices: list[int] = []
        self.batches: list[Batch] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return zip(self.indices, self.batches, strict=True)

    @classmethod
    def of_one(cls, index: int, batch: Batch) -> "Bundle":
        """A batch that is run by itself."""
        bundle = cls()
        bundle.add(index, batch)
        return bundle

    def add(self, index: int, batch: Batch) -> None:
        """Add one more batch."""
        self.size += batch.size
        self.indices.append(index)
        self.batches.append(batch)

    def has_room_for(self, batch: Batch, capacity: int) -> bool:
        """Whether a batch can be run with these, in a bundle of at most `capacity` samples."""
        return self.size + batch.size <= capacity and self.batches[0].joins(batch)

    def join(self) -> Batch:
        """All samples as one batch. The batches become views of it: only one copy is kept."""
        if len(self) == 1:
            return self.batches[0]
        whole = Batch.joined(self.batches)
        stops = accumulate(batch.size for batch in self.batches)
        self.batches = [
            whole.take(stop - batch.size, stop)
            for stop, batch in zip(stops, self.batches, strict=True)
        ]
        return whole


def bundled(
    reading: Reading, batches: Iterable[Batch], capacity: Callable[[Batch], int]
) -> Iterator[Bundle]:
    """Bundle consecutive small batches of the same structure, if they may be read ahead.

    Args:
        reading: Where the batches come from.
        batches: The batches.
        capacity: How many samples like those of a batch fit in memory at once; 0 if a batch must
            be run by itself.
    """
    waiting = Bundle()
    for batch in batches:
        limit = capacity(batch) // BUNDLED_SHARE if reading.may_read_ahead else 0
        if waiting and not waiting.has_room_for(batch, limit):
            yield waiting
            waiting = Bundle()
        if batch.size > limit / 2:
            yield Bundle.of_one(reading.index, batch)
        else:
            waiting.add(reading.index, batch.copied())
    if waiting:
        yield waiting


@contextmanager
def naming(index: int) -> Iterator[None]:
    """Name the batch in an `InvalidBatch` that is raised inside the context."""
    try:
        yield
    except InvalidBatch as error:
        raise InvalidBatch(f"in batch {index} (counted from 0): {error}") from error


def _is_last(batches: Iterable[Any], number: int) -> bool:
    """Whether batch `number` is known to be the last one."""
    try:
        return isinstance(batches, Sized) and number + 1 == len(batches)
    except TypeError:  # a DataLoader over an iterable has a `__len__` that raises
        return False
