"""The recipe for Fabric."""

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

pytest.importorskip("lightning")


def loader(space: ModuleType, batch_size: int) -> DataLoader:
    """The first 8 samples of the first task."""
    return space.fabric.setup_dataloaders(
        DataLoader(Subset(space.tasks[0], range(8)), batch_size=batch_size)
    )


class TestFabric(Contract):
    page = "fabric"

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


def test_the_wrapped_model_and_the_plain_one_give_the_same_state() -> None:
    space = recipe("fabric")
    plain = EWC(space.plain, Classification())
    wrapped = EWC(space.model, Classification())
    plain.consolidate(DataLoader(space.tasks[0], batch_size=16))
    wrapped.consolidate(loader := space.fabric.setup_dataloaders(DataLoader(space.tasks[0])))
    assert len(loader) == 16
    assert list(wrapped.fisher) == list(dict(space.plain.named_parameters()))
    assert same(wrapped.anchor, plain.anchor)
    for name, fisher in plain.fisher.items():
        torch.testing.assert_close(wrapped.fisher[name], fisher)


def test_the_file_is_read_with_weights_only(tmp_path: Path) -> None:
    space = recipe("fabric")
    space.save(tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["ewc"]["n_tasks"] == 2


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions(precision: str) -> None:
    space = recipe("fabric", loop=False)
    fabric = space.Fabric(accelerator="cpu", devices=1, precision=precision)
    model = fabric.setup_module(space.make_model())
    ewc = EWC(model, Classification(), forward=space.cast)
    ewc.consolidate(fabric.setup_dataloaders(DataLoader(space.tasks[0], batch_size=4)))
    dtype = next(model.parameters()).dtype
    assert dtype is not torch.float32
    plain = space.make_model().to(dtype).float()
    plain.load_state_dict({name: each.float() for name, each in model.module.state_dict().items()})
    expected = EWC(plain, Classification())
    expected.consolidate(DataLoader(space.tasks[0], batch_size=4))
    for name, fisher in expected.fisher.items():
        torch.testing.assert_close(
            ewc.fisher[name].float(), fisher, rtol=0.1, atol=0.02 * float(fisher.max())
        )
