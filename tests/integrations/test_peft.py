"""The recipe for PEFT, and a PEFT model in the Trainer."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.integrations.recipes import (
    Contract,
    assert_near,
    gradients,
    move,
    named,
    recipe,
    recorded,
    written_out,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

# PEFT asks for it under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def batches(space: ModuleType, size: int) -> list[dict[str, Tensor]]:
    """The first 8 samples of the first task."""
    ids = torch.cat([batch["input_ids"] for batch in space.tasks[0]])[:8]
    return [{"input_ids": part, "labels": part} for part in ids.split(size)]


def plain_loss(space: ModuleType) -> Tensor:
    (batch,) = batches(space, 8)
    logits = space.model(input_ids=batch["input_ids"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


class TestPEFT(Contract):
    page = "peft"
    dtype = torch.float64

    def step(self, space: ModuleType, folder: Path, accumulate: int) -> None:
        space.train(batches(space, 8 // accumulate), accumulate)

    def loss(self, space: ModuleType) -> Tensor:
        return plain_loss(space)

    def save_between(self, space: ModuleType, folder: Path) -> None:
        self.step(space, folder, 2)
        space.save(folder / "adapter")
        self.step(space, folder, 2)

    def resume(self, space: ModuleType, folder: Path) -> ModuleType:
        space.resume(folder / "adapter")
        self.step(space, folder, 2)
        return space

    def evaluate(self, space: ModuleType, folder: Path) -> float:
        return float(space.evaluate(batches(space, 4)))


def test_the_adapter_alone_is_protected() -> None:
    space = recipe("peft")
    trainable = {n for n, p in space.model.named_parameters() if p.requires_grad}
    assert set(space.regularizer.fisher) == trainable
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert first in space.regularizer.fisher
    assert space.regularizer.fisher[first].any()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_in_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    pytest.importorskip("accelerate")
    from ewc.integrations.transformers import EWCMixin

    class Trainer(EWCMixin, transformers.Trainer):
        pass

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    space = recipe("peft")
    move(space.model)
    (batch,) = batches(space, 8)
    rows: list[Any] = [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"]]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        max_grad_norm=0.0,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    loss = gradients(space.model, plain_loss(space))
    penalty = gradients(space.model, written_out(space.regularizer, space.model))
    with recorded() as steps:
        Trainer(
            model=space.model, args=arguments, train_dataset=rows, ewc=space.regularizer
        ).train()
    (found,) = steps
    assert_near(named(found, space.model), {name: loss[name] + penalty[name] for name in loss})
    assert {"adapter_model.safetensors", "ewc.pt"} < {
        path.name for path in (tmp_path / "checkpoint-1").iterdir()
    }
