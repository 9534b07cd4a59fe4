"""The recipe for Accelerate."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ewc import EWC, Classification
from tests.integrations.recipes import Contract, recipe
from tests.support.tasks import same

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _no_shared_state() -> Iterator[None]:
    """An Accelerator shares its settings with all later ones of the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def loader(space: ModuleType, batch_size: int) -> DataLoader:
    """The first 8 samples of the first task."""
    return space.accelerator.prepare(
        DataLoader(Subset(space.tasks[0], range(8)), batch_size=batch_size)
    )


class TestAccelerate(Contract):
    page = "accelerate"

    def step(self, space: ModuleType, folder: Path, accumulate: int) -> None:
        space.accelerator.gradient_accumulation_steps = accumulate
        space.train(loader(space, 8 // accumulate))

    def loss(self, space: ModuleType) -> Tensor:
        ((x, y),) = loader(space, 8)
        return F.cross_entropy(space.model(x), y)

    def save_between(self, space: ModuleType, folder: Path) -> None:
        self.step(space, folder, 2)
        space.save(folder / "checkpoint")
        self.step(space, folder, 2)

    def resume(self, space: ModuleType, folder: Path) -> ModuleType:
        space.resume(folder / "checkpoint")
        self.step(space, folder, 2)
        return space

    def evaluate(self, space: ModuleType, folder: Path) -> float:
        return float(space.evaluate(loader(space, 3)))


def test_the_prepared_loader_and_a_plain_one_give_the_same_state() -> None:
    space = recipe("accelerate")
    model = space.accelerator.unwrap_model(space.model)
    one, other = EWC(model, Classification()), EWC(model, Classification())
    one.consolidate(DataLoader(space.tasks[0], batch_size=16))
    other.consolidate(loader := space.accelerator.prepare(DataLoader(space.tasks[0])))
    assert len(loader) == 16
    assert same(other.anchor, one.anchor)
    for name, fisher in one.fisher.items():
        torch.testing.assert_close(other.fisher[name], fisher)
