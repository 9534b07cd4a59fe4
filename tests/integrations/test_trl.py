"""The recipe for TRL's SFTTrainer, packed or not."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.integrations.recipes import Contract, assert_near, recipe

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

# Steps that show gradients as they are: neither clipped nor adapted.
EXACT = {
    "max_grad_norm": 0.0,
    "optim": "sgd",
    "learning_rate": 0.05,
    "logging_strategy": "no",
    "gradient_checkpointing": False,
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class TestSFT(Contract):
    page = "trl"
    dtype = torch.float64

    def step(self, space: ModuleType, folder: Path, accumulate: int) -> None:
        trainer = space.make_trainer(
            space.tasks[0].select(range(8)),
            "step",
            per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
            **EXACT,
        )
        trainer.train()

    def loss(self, space: ModuleType) -> Tensor:
        trainer = space.make_trainer(
            space.tasks[0].select(range(8)), "loss", per_device_train_batch_size=8
        )
        (batch,) = trainer.get_train_dataloader()
        logits = space.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:]
        counts = targets != -100
        return F.cross_entropy(logits[:, :-1][counts], targets[counts])

    def save_between(self, space: ModuleType, folder: Path) -> None:
        self.two_steps(space).train()

    def resume(self, space: ModuleType, folder: Path) -> ModuleType:
        self.two_steps(space).train(resume_from_checkpoint="two-steps/checkpoint-1")
        return space

    def two_steps(self, space: ModuleType) -> Any:
        return space.make_trainer(
            space.tasks[0], "two-steps", gradient_accumulation_steps=2, save_steps=1, max_steps=2
        )

    def evaluate(self, space: ModuleType, folder: Path) -> float:
        trainer = space.make_trainer(space.tasks[0], "evaluation", per_device_eval_batch_size=8)
        return trainer.evaluate(trainer.train_dataset.select(range(8)))["eval_loss"]

    def test_packed_texts_give_the_same_fisher(self) -> None:
        space = recipe(self.page)
        found = {}
        for packed in (False, True):
            trainer = space.make_trainer(
                space.tasks[0],
                "packed",
                packing=packed,
                max_length=32,
                gradient_checkpointing=False,
            )
            loader = trainer.get_train_dataloader()
            ewc = space.EWC(space.model, space.likelihood)
            summary = ewc.consolidate(space.texts(loader) if packed else loader)
            assert summary.samples == 16
            assert set(summary.paths.values()) == {"rule"}
            found[packed] = ewc.fisher
        assert_near(found[True], found[False])
        assert all(torch.isfinite(each).all() for each in found[True].values())
