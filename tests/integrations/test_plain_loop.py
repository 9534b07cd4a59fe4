"""The recipe for a plain training loop; it needs no other library."""

from pathlib import Path
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tests.integrations.recipes import Contract


def loader(space: ModuleType, batch_size: int) -> DataLoader:
    """The first 8 samples of the first task."""
    return DataLoader(Subset(space.tasks[0].dataset, range(8)), batch_size=batch_size)


class TestPlainLoop(Contract):
    page = "plain-loop"

    def step(self, space: ModuleType, folder: Path, accumulate: int) -> None:
        space.train(loader(space, 8 // accumulate), accumulate)

    def loss(self, space: ModuleType) -> Tensor:
        ((x, y),) = loader(space, 8)
        return F.cross_entropy(space.model(x), y)

    def save_between(self, space: ModuleType, folder: Path) -> None:
        self.step(space, folder, 2)
        space.save(folder / "checkpoint.pt")
        self.step(space, folder, 2)

    def resume(self, space: ModuleType, folder: Path) -> ModuleType:
        space.resume(folder / "checkpoint.pt")
        self.step(space, folder, 2)
        return space

    def evaluate(self, space: ModuleType, folder: Path) -> float:
        return float(space.evaluate(loader(space, 3)))
