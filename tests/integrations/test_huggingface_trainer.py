"""The recipe for the Trainer of Hugging Face's transformers, and the mix-in that it needs."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc import EWC, Classification
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
from tests.support.tasks import same

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # without it, the Trainer refuses

# Steps that show gradients as they are: neither clipped nor adapted.
EXACT = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.05, "logging_strategy": "no"}

Row = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tokens(space: ModuleType, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Logits and their targets, of all positions that count."""
    batch = space.collator(rows)
    logits = space.model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
    targets = batch["labels"][:, 1:]
    counts = targets != -100
    return logits[:, :-1][counts], targets[counts]


class TestTrainer(Contract):
    page = "huggingface-trainer"
    dtype = torch.float64

    def step(self, space: ModuleType, folder: Path, accumulate: int) -> None:
        trainer = space.make_trainer(
            space.tasks[0][:8],
            "step",
            per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
            **EXACT,
        )
        trainer.train()

    def loss(self, space: ModuleType) -> Tensor:
        return F.cross_entropy(*tokens(space, space.tasks[0][:8]))

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
        return trainer.evaluate(space.tasks[0][:8])["eval_loss"]

    def test_the_next_task_begins_from_what_was_saved(self) -> None:
        space = recipe(self.page)
        assert {"ewc.pt", "config.json"} < set(os.listdir("task-1/learned"))
        move(space.model)
        fresh = recipe(self.page, seed=1, loop=False)
        fresh.begin_next_task("task-1/learned")
        assert fresh.regularizer.n_tasks == 2
        assert same(fresh.regularizer.fisher, space.regularizer.fisher)
        move(fresh.model)
        assert torch.equal(fresh.regularizer(), space.regularizer())

    def test_the_last_checkpoint_is_found_as_the_trainer_finds_it(self) -> None:
        space = self.learned()
        trainer = self.two_steps(space)
        trainer.train()
        fresh = recipe(self.page, seed=1, loop=False)
        self.two_steps(fresh).train(resume_from_checkpoint=True)
        assert same(fresh.regularizer.anchor, space.regularizer.anchor)

    def test_the_last_step_may_have_fewer_batches(self) -> None:
        space = self.learned()
        rows = space.tasks[0][:14]  # 7 batches: 4, and 3
        with recorded() as steps:
            space.make_trainer(
                rows,
                "uneven",
                per_device_train_batch_size=2,
                gradient_accumulation_steps=4,
                **EXACT | {"learning_rate": 0.0},
            ).train()
        assert len(steps) == 2
        penalty = gradients(space.model, written_out(space.regularizer, space.model))
        # The same weights for both: one of the two is about the 6 samples that come last.
        with recorded() as without:
            space.regularizer.strength = 0.0
            space.make_trainer(
                rows,
                "uneven",
                per_device_train_batch_size=2,
                gradient_accumulation_steps=4,
                **EXACT | {"learning_rate": 0.0},
            ).train()
        for found, loss in zip(steps, without, strict=True):
            before = named(loss, space.model)
            expected = {name: before[name] + penalty[name] for name in penalty}
            assert_near(named(found, space.model), expected)


class Plain(nn.Module):
    """A classifier that knows nothing of items in a batch: its loss is a mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def mean_of_the_accumulated(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


def logits(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"])["logits"]


def classifier() -> tuple[nn.Module, EWC, list[Row]]:
    """A model that has learned a task and has moved on, and data."""
    torch.manual_seed(0)
    model = Plain()
    rows = [{"x": torch.randn(5), "labels": torch.tensor(n % 3)} for n in range(8)]
    ewc = EWC(model, Classification(), forward=logits, strength=20.0)
    ewc.consolidate([transformers.default_data_collator(rows)])
    move(model)
    return model, ewc, rows


def gradients_of(trainer_class: Any, model: nn.Module, rows: list[Row], **given: Any) -> Any:
    """Of one step of a Trainer, in four batches."""
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        **EXACT,
        **given.pop("arguments", {}),
    }
    trainer = trainer_class(
        model=model,
        args=transformers.TrainingArguments("out", **arguments),
        train_dataset=rows,
        **given,
    )
    with recorded() as steps:
        trainer.train()
    (found,) = steps
    return named(found, model)


def mixed(*bases: Any, **attributes: Any) -> Any:
    from ewc.integrations.transformers import EWCMixin

    return type("Mixed", (EWCMixin, *bases, transformers.Trainer), attributes)


class Sums:
    """A loss of the user's own, which is scaled if the class says so."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs["loss"] / (4 if self.loss_is_scaled_for_ga else 1)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    ("attributes", "given", "bases"),
    [
        ({}, {}, ()),
        ({}, {"compute_loss_func": mean_of_the_accumulated}, ()),
        ({"loss_is_scaled_for_ga": True}, {}, (Sums,)),
        ({"loss_is_scaled_for_ga": False}, {}, (Sums,)),
    ],
    ids=["mean of a batch", "compute_loss_func", "said to be scaled", "said not to be"],
)
def test_whoever_scales_the_loss(attributes: Any, given: Any, bases: Any) -> None:
    if attributes and not hasattr(transformers.Trainer, "loss_is_scaled_for_ga"):
        pytest.skip("transformers before 5.19")
    model, ewc, rows = classifier()
    batch = transformers.default_data_collator(rows)
    loss = gradients(model, F.cross_entropy(logits(model, batch), batch["labels"]))
    penalty = gradients(model, written_out(ewc, model))
    found = gradients_of(mixed(*bases, **attributes), model, rows, ewc=ewc, **given)
    assert_near(found, {name: loss[name] + penalty[name] for name in loss})


def test_label_smoothing() -> None:
    space = recipe("huggingface-trainer")
    move(space.model)
    rows = space.tasks[0][:8]
    smoothed = F.cross_entropy(*tokens(space, rows), label_smoothing=0.1)
    loss = gradients(space.model, smoothed)
    penalty = gradients(space.model, written_out(space.regularizer, space.model))
    found = gradients_of(
        space.ContinualTrainer,
        space.model,
        rows,
        ewc=space.regularizer,
        arguments={"label_smoothing_factor": 0.1},
    )
    assert_near(found, {name: loss[name] + penalty[name] for name in loss})


def test_without_the_mixin_it_counts_once_for_every_batch() -> None:
    space = recipe("huggingface-trainer")
    move(space.model)
    rows = space.tasks[0][:8]

    class Naive(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().compute_loss(*args, **kwargs) + space.regularizer()

    loss = gradients(space.model, F.cross_entropy(*tokens(space, rows)))
    penalty = gradients(space.model, written_out(space.regularizer, space.model))
    found = gradients_of(Naive, space.model, rows)
    assert_near(found, {name: loss[name] + 4 * penalty[name] for name in loss})


def test_a_model_that_is_made_anew_is_refused() -> None:
    model, ewc, rows = classifier()
    with pytest.raises(ValueError, match="model_init"):
        gradients_of(mixed(), None, rows, ewc=ewc, model_init=lambda: model)


def test_ewc_must_be_one() -> None:
    model, _, rows = classifier()
    with pytest.raises(TypeError, match="EWC or OnlineEWC; found Plain"):
        gradients_of(mixed(), model, rows, ewc=model)
