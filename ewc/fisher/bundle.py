"""Small batches that are run together.

What the samples of a batch contribute to the Fisher information has nothing to do with the batch,
while every run of a model takes some time of its own, which for a small model is most of it.
"""

from collections.abc import Iterator
from itertools import accumulate

from ewc.data.batch import Batch


class Bundle:
    """Batches that come one after the other, and are run as one.

    Attributes:
        size: The number of samples.
        places: Which batches of the loader they are, counted from 0.
        batches: The batches.
    """

    def __init__(self) -> None:
        self.size = 0
        self.places: list[int] = []
        self.batches: list[Batch] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return zip(self.places, self.batches, strict=True)

    @classmethod
    def of_one(cls, place: int, batch: Batch) -> "Bundle":
        """A batch that is run by itself."""
        bundle = cls()
        bundle.add(place, batch)
        return bundle

    def add(self, place: int, batch: Batch) -> None:
        """Take one more in."""
        self.size += batch.size
        self.places.append(place)
        self.batches.append(batch)

    def takes(self, batch: Batch, samples: int) -> bool:
        """Whether one more batch can be run together with these, `samples` samples in all."""
        return self.size + batch.size <= samples and self.batches[0].joins(batch)

    def join(self) -> Batch:
        """The one batch that is run; its parts take the place of the batches, and their memory."""
        if len(self) == 1:
            return self.batches[0]
        whole = Batch.joined(self.batches)
        stops = accumulate(batch.size for batch in self.batches)
        self.batches = [
            whole.take(stop - batch.size, stop)
            for stop, batch in zip(stops, self.batches, strict=True)
        ]
        return whole
