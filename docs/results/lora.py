"""EWC for LoRA: in the space of the weights or of the adapter (EWC-LoRA, arXiv 2602.17559).

A network is trained on a first task and frozen. One LoRA adapter of rank 4 beside each of its
weight matrices learns two more tasks. EWC of the adapter protects `up` and `down`; EWC of the
weights is evaluated at `base + up @ down`, with a Fisher of samples, or of the mean gradients of
batches, as published. The digits 0-4, 5-6 and 7-9 with outputs of their own; or all ten digits
upright, turned by 90 degrees, and by 180, with one head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from _data import Part, mnist
from _intervals import estimate, paired
from _learning import SIDE, Fisher, Task
from _study import SEEDS, TUNING_SEEDS, Store, Strength, Study, automatic, chosen, table, tuned
from torch import Tensor, nn
from torch.func import functional_call

from ewc import EWC, Classification

RANK, STEPS, BATCH, LR = 4, 300, 64, 3e-3
SAMPLES = 1024  # to train, per task
SCORED = 500  # to validate and to test by, per task
GRID = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
HEADS = {"split": ((0, 1, 2, 3, 4), (5, 6), (7, 8, 9)), "turned": (tuple(range(10)),) * 3}
NONE = "LoRA alone"
METHODS = {
    "EWC of the adapter": Fisher(),
    "EWC of the weights": Fisher(),
    "EWC of the weights, batches of 64": Fisher(batch=64),
}
AUTO = ("EWC of the adapter", "EWC of the weights")
"""What is also run with `strength="auto"`."""


class Adapted(nn.Module):
    """A frozen network, and two small trained matrices beside each of its weight matrices."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.names = matrices(base)
        shapes = [base.get_parameter(name).shape for name in self.names]
        self.down = nn.ParameterList(torch.randn(RANK, n) / n**0.5 for _, n in shapes)
        self.up = nn.ParameterList(torch.zeros(n, RANK) for n, _ in shapes)

    def weights(self) -> dict[str, Tensor]:
        """The weight matrices with the adapter, by their names in the network."""
        triples = zip(self.names, self.up, self.down, strict=True)
        return {name: self.base.get_parameter(name) + up @ down for name, up, down in triples}

    def forward(self, x: Tensor) -> Tensor:
        """The network's outputs with these weights."""
        outputs: Tensor = functional_call(self.base, self.weights(), x)
        return outputs


def matrices(base: nn.Module) -> list[str]:
    """The names of the weight matrices."""
    return [name for name, one in base.named_parameters() if one.dim() == 2]


def tasks(kind: str, seed: int) -> list[Task]:
    """Three tasks."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for turns, head in enumerate(HEADS[kind]):
        parts = []
        for data, size in zip(mnist(SIDE), (SAMPLES, SCORED, SCORED), strict=True):
            some = torch.isin(data.y, torch.tensor(head)).nonzero()[:, 0]
            some = some[torch.randperm(len(some), generator=generator)[:size]]
            x = data.x[some].view(-1, SIDE, SIDE)
            if kind == "turned":
                x = x.rot90(turns, (1, 2))
            parts.append(Part(x.flatten(1), data.y[some] - head[0]))
        found.append(Task(*parts, list(head)))
    return found


def train(
    model: nn.Module, task: Task, steps: int, penalty: Callable[[], Tensor | float] = float
) -> None:
    """Adam, on the cross-entropy within the head and the penalty; `float()` is 0."""
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=LR)
    for _ in range(steps):
        x, y = task.train.where(torch.randint(len(task.train.y), (BATCH,)))
        loss = F.cross_entropy(model(x)[:, task.head], y) + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@cache
def base_of(kind: str, seed: int, steps: int) -> nn.Module:
    """A network that knows the first task."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(SIDE**2, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(100, 10))
    train(model, tasks(kind, seed)[0], steps)
    return model


def adapt(kind: str, method: str, k: Strength, seed: int, steps: int) -> dict[str, Any]:
    """Learn the tasks after the first with LoRA; accuracies on all three after the last."""
    learned = tasks(kind, seed)
    merged = copy.deepcopy(base_of(kind, seed, steps))
    torch.manual_seed(seed)
    model = Adapted(copy.deepcopy(merged))
    in_weights = method != "EWC of the adapter"
    protected = merged if in_weights else model
    regularizer = EWC(
        protected,
        Classification(),
        strength="auto" if k == "auto" else 0.0,
        parameters=matrices(merged) if in_weights else None,
    )

    def penalty() -> Tensor:
        return regularizer(at=model.weights()) if in_weights else regularizer()

    for index, task in enumerate(learned):
        if index > 0:
            train(model, task, steps, float if method == NONE else penalty)
        if method == NONE or (index == 0 and not in_weights):
            continue  # the adapter is all zeros before it has learned a task
        merged.load_state_dict(model.weights(), strict=False)
        fisher = METHODS[method]
        summary = regularizer.consolidate(
            fisher.batches(task.train), likelihood=fisher.likelihood(task.head)
        )
        if k != "auto":
            regularizer.strength = k / summary.largest
    each = [_accuracy(model, one.test, one.head) for one in learned]
    validation = [_accuracy(model, one.validation, one.head) for one in learned]
    return {
        "validation": round(sum(validation) / len(learned), 5),
        "test": round(sum(each) / len(learned), 5),
        "tasks": each,
    }


@torch.no_grad()
def _accuracy(model: nn.Module, part: Part, head: list[int]) -> float:
    return round(float((model(part.x)[:, head].argmax(1) == part.y).float().mean()), 5)


def run(store: Store, quick: bool) -> None:
    """All runs; the quick form has two seeds, few steps and one strength."""
    steps, seeds, grid = (5, SEEDS[:2], GRID[:1]) if quick else (STEPS, SEEDS, GRID)
    for kind in HEADS:
        for seed in seeds:
            key = {"kind": kind, "method": NONE, "seed": seed}
            store.run(lambda i=kind, s=seed: adapt(i, NONE, 0.0, s, steps), **key)
        for method in METHODS:

            def one(k: Strength, seed: int, kind: str = kind, method: str = method) -> Any:
                return adapt(kind, method, k, seed, steps)

            name = {"kind": kind, "method": method}
            tuned(store, grid, one, seeds=seeds, tuning_seeds=TUNING_SEEDS, **name)
            if method in AUTO:
                automatic(store, one, seeds=seeds, **name)


def tables(store: Store) -> dict[str, str]:
    """By name."""
    return {kind: _table(store, kind) for kind in HEADS}


def _table(store: Store, kind: str) -> str:
    head = ["", "best k", "average", "beside EWC of the adapter", "first task", "second", "last"]
    key: dict[str, Any] = {"kind": kind, "method": "EWC of the adapter"}
    adapter = store.values("test", **key, strength=chosen(store, **key))
    rows = []
    for method in (NONE, *METHODS):
        key = {"kind": kind, "method": method}
        if method != NONE:
            key["strength"] = chosen(store, **key)
        values = store.values("test", **key)
        rows.append(
            [
                method,
                f"{key['strength']:g}" if method != NONE else "",
                estimate(values).text(digits=1),
                paired(values, adapter).text(digits=1, sign=True),
                *(
                    estimate(one).text(digits=1)
                    for one in zip(*store.values("tasks", **key), strict=True)
                ),
            ]
        )
    return table(head, rows)


STUDY = Study("lora", run, tables)


if __name__ == "__main__":
    STUDY.main()
