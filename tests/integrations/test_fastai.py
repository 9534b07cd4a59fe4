"""The recipe for fastai."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset

from tests.integrations.recipes import Contract

pytest.importorskip("fastai")
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore:The .mode.chained_assignment. option"
)


def quiet(learner: Any, act: Any) -> Any:
    with learner.no_logging():
        return act()


class TestFastai(Contract):
    page = "fastai"

    def step(self, space: ModuleType, folder: Path, accumulate: int) -> None:
        from fastai.callback.training import GradientAccumulation

        learner = space.make_learner(
            Subset(space.tasks[0], range(8)), 8 // accumulate, GradientAccumulation(8)
        )
        (protect,) = [each for each in learner.cbs if isinstance(each, space.Protect)]
        protect.after_fit = lambda: None  # the task is not over
        quiet(learner, lambda: learner.fit(1))

    def loss(self, space: ModuleType) -> Tensor:
        x, y = (each[:8] for each in space.tasks[0].tensors)
        return F.cross_entropy(space.model(x), y)

    def save_between(self, space: ModuleType, folder: Path) -> None:
        self.step(space, folder, 1)
        space.save(folder / "checkpoint.pt")
        self.step(space, folder, 1)

    def resume(self, space: ModuleType, folder: Path) -> ModuleType:
        space.resume(folder / "checkpoint.pt")
        self.step(space, folder, 1)
        return space

    def evaluate(self, space: ModuleType, folder: Path) -> float:
        learner = space.make_learner(Subset(space.tasks[0], range(8)))
        (loss,) = quiet(learner, learner.validate)
        assert space.regularizer.n_tasks == 2  # `validate` ends in `after_fit`, too
        return loss
