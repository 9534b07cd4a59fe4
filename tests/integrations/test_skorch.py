"""The recipe for skorch."""

import pickle
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.integrations.recipes import Contract, move

pytest.importorskip("skorch")


class TestSkorch(Contract):
    page = "skorch"

    def ready(self, space: ModuleType) -> ModuleType:
        space.model, space.regularizer = space.net.module_, space.net.regularizer_
        return space

    def step(self, space: ModuleType, folder: Path, accumulate: int) -> None:
        if accumulate > 1:
            pytest.skip("skorch makes one step for each batch")
        X, y = space.tasks[0]
        space.net.set_params(batch_size=8, max_epochs=1)
        space.net.partial_fit(X[:8], y[:8])

    def loss(self, space: ModuleType) -> Tensor:
        X, y = (torch.from_numpy(each[:8]) for each in space.tasks[0])
        return F.cross_entropy(space.model(X), y)

    def save_between(self, space: ModuleType, folder: Path) -> None:
        self.step(space, folder, 1)
        space.save(folder)
        self.step(space, folder, 1)

    def resume(self, space: ModuleType, folder: Path) -> ModuleType:
        space.resume(folder)
        self.step(space, folder, 1)
        return space

    def evaluate(self, space: ModuleType, folder: Path) -> float:
        X, y = space.tasks[0]
        net = space.net.set_params(batch_size=8)
        (batch,) = net.get_iterator(net.get_dataset(X[:8], y[:8]))
        return float(net.validation_step(batch)["loss"])

    def test_a_pickled_net_penalises_its_own_module(self) -> None:
        space = self.learned()
        again = pickle.loads(pickle.dumps(space.net))
        assert again.regularizer_() == space.regularizer() > 0
        move(again.module_)
        assert again.regularizer_() > 1.5 * space.regularizer()
