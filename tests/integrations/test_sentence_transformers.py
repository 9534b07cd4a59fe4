"""The recipe for sentence-transformers."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.integrations.recipes import Contract

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate")  # without it, the Trainer refuses

# Of an option that sentence-transformers passes to accelerate.
pytestmark = pytest.mark.filterwarnings("ignore:.broadcast_buffers. is deprecated:FutureWarning")

# Steps that show gradients as they are: neither clipped nor adapted.
EXACT = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.05, "logging_strategy": "no"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class TestSentenceTransformers(Contract):
    page = "sentence-transformers"
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
        (batch,) = space.batches(trainer)
        return F.mse_loss(space.similarity(space.model, batch), batch[1])

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
        return trainer.evaluate(space.tasks[0].select(range(8)))["eval_loss"]

    def test_all_goes_by_rule(self) -> None:
        space = self.learned()
        trainer = space.make_trainer(space.tasks[0], "paths")
        assert set(space.regularizer.consolidate(space.batches(trainer)).paths.values()) == {"rule"}
