"""Small batches that are run together.

What the samples of a batch contribute to the Fisher information has nothing to do with the batch,
while every run of a model takes some time of its own, which for a small model is most of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ewc._batches import Batch


@dataclass
class Bundle:
    """Batches that come one after the other, and are run as one.

    Attributes:
        batches: The batches.
        places: Which batches of the loader they are, counted from 0.
    """

    batches: list[Batch] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return zip(self.places, self.batches, strict=True)

    @property
    def size(self) -> int:
        """The number of samples."""
        return sum(batch.size for batch in self.batches)

    def add(self, place: int, batch: Batch) -> None:
        """Take one more in."""
        self.places.append(place)
        self.batches.append(batch)

    def takes(self, batch: Batch, samples: int) -> bool:
        """Whether one more batch can be run together with these, `samples` samples in all."""
        return self.size + batch.size <= samples and self.batches[0].joins(batch)

    @property
    def joined(self) -> Batch:
        """The one batch that is run."""
        return self.batches[0] if len(self) == 1 else Batch.joined(self.batches)
