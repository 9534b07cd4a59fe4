"""The recipe for Lightning."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ewc import EWC, Classification
from tests.integrations.recipes import Contract, assert_near, move, recipe
from tests.support.tasks import same

L = pytest.importorskip("lightning")

pytestmark = [
    # Advice on workers, and on steps that these small loaders do not have.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # What Lightning uses of torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def loader(space: ModuleType, batch_size: int) -> DataLoader:
    """The first 8 samples of the first task."""
    return DataLoader(Subset(space.tasks[0].dataset, range(8)), batch_size=batch_size)


def trainer(space: ModuleType, *callbacks: Any, **options: Any) -> Any:
    return L.Trainer(**space.quiet | {"callbacks": list(callbacks)} | options)


class TestLightning(Contract):
    page = "lightning"

    def ready(self, space: ModuleType) -> ModuleType:
        space.model, space.regularizer = space.module.net, space.module.regularizer
        return space

    def step(self, space: ModuleType, folder: Path, accumulate: int) -> None:
        fit = trainer(space, max_steps=1, accumulate_grad_batches=accumulate)
        fit.fit(space.module, loader(space, 8 // accumulate))

    def loss(self, space: ModuleType) -> Tensor:
        ((x, y),) = loader(space, 8)
        return F.cross_entropy(space.model(x), y)

    def save_between(self, space: ModuleType, folder: Path) -> None:
        self.two_epochs(space, folder).fit(space.module, loader(space, 8))

    def resume(self, space: ModuleType, folder: Path) -> ModuleType:
        path = folder / "epoch=0.ckpt"
        fit = self.two_epochs(space, folder)
        fit.fit(space.module, loader(space, 8), ckpt_path=path, weights_only=True)
        return space

    def two_epochs(self, space: ModuleType, folder: Path) -> Any:
        # Of one step each: a plain loader begins anew where Lightning resumes inside an epoch.
        checkpoints = L.pytorch.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        return trainer(
            space, space.consolidate, checkpoints, max_epochs=2, enable_checkpointing=True
        )

    def evaluate(self, space: ModuleType, folder: Path) -> float:
        (metrics,) = trainer(space).validate(space.module, loader(space, 4), verbose=False)
        return metrics["val_loss"]


def test_the_next_task_begins_from_the_file(tmp_path: Path) -> None:
    space = recipe("lightning")
    space.save(tmp_path / "after.ckpt")
    move(space.module.net)
    fresh = recipe("lightning", seed=1, loop=False)
    fresh.begin_next_task(tmp_path / "after.ckpt")
    assert fresh.module.regularizer.n_tasks == 2
    assert same(fresh.module.regularizer.anchor, space.module.regularizer.anchor)
    move(fresh.module.net)
    assert torch.equal(fresh.module.regularizer(), space.module.regularizer())


def test_distributed_data_parallel_on_one_process() -> None:
    space = recipe("lightning", loop=False)
    expected = EWC(space.module.net, Classification())
    try:
        for loader in space.tasks:
            fit = trainer(space, space.consolidate, max_epochs=1, strategy="ddp")
            fit.fit(space.module, loader)
            expected.consolidate(loader)
    finally:
        torch.distributed.destroy_process_group()
    assert space.module.regularizer.n_tasks == 2
    assert_near(space.module.regularizer.anchor, expected.anchor)
    assert_near(space.module.regularizer.fisher, expected.fisher)


def test_true_half_precision() -> None:
    space = recipe("lightning", loop=False)
    space.module.regularizer = EWC(space.module.net, Classification(), forward=space.cast)
    fit = trainer(
        space, space.Consolidate(space.module.regularizer), max_epochs=1, precision="bf16-true"
    )
    fit.fit(space.module, space.tasks[0])
    assert space.module.net[0].weight.dtype is torch.bfloat16
    assert space.module.regularizer.n_tasks == 1
    assert all(each.dtype is torch.float32 for each in space.module.regularizer.fisher.values())
