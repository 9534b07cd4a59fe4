"""The recipe for pytorch-forecasting."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.integrations.recipes import Contract

pytest.importorskip("pytorch_forecasting")
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore:ReduceLROnPlateau:RuntimeWarning"
)


class TestForecasting(Contract):
    page = "pytorch-forecasting"

    def loader(self, space: ModuleType) -> Any:
        """One batch: the first 8 windows of the first task."""
        dataset = torch.utils.data.Subset(space.tasks[0], range(8))
        return torch.utils.data.DataLoader(
            dataset, batch_size=8, collate_fn=space.tasks[0]._collate_fn
        )

    def trainer(self, space: ModuleType, folder: Path) -> Any:
        return space.Trainer(max_epochs=1, default_root_dir=folder, **space.settings)

    def step(self, space: ModuleType, folder: Path, accumulate: int) -> None:
        if accumulate > 1:
            pytest.skip("the loss of a batch is a root, not a mean: batches do not add up")
        self.trainer(space, folder).fit(space.model, self.loader(space))

    def loss(self, space: ModuleType) -> Tensor:
        ((x, (y, _)),) = self.loader(space)
        return F.mse_loss(space.prediction(space.model, (x, y)), y).sqrt()

    def save_between(self, space: ModuleType, folder: Path) -> None:
        self.step(space, folder, 1)
        space.save(folder / "checkpoint.pt")
        self.step(space, folder, 1)

    def resume(self, space: ModuleType, folder: Path) -> ModuleType:
        space.resume(folder / "checkpoint.pt")
        self.step(space, folder, 1)
        return space

    def evaluate(self, space: ModuleType, folder: Path) -> float:
        (metrics,) = self.trainer(space, folder).validate(
            space.model, self.loader(space), verbose=False
        )
        return metrics["val_loss"]
