"""Sequences of tasks made of scikit-learn's handwritten digits, and a network that learns them.

1797 images of 8 x 8 pixels come with scikit-learn; 360 of them are test data, in every task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ewc import EWC, Classification, OnlineEWC

TEST_SAMPLES = 360
FAR = 100.0
"""No parameter comes near this; one that does is on its way to infinity."""


class Task(NamedTuple):
    """`x` is [samples, 64] in [0, 1]; `y` is [samples], counted within `head`."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    head: Sequence[int]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The training data, once, in order."""
        return zip(self.x.split(256), self.y.split(256), strict=True)


def permuted(tasks: int, seed: int) -> list[Task]:
    """All ten digits in every task, the pixels in another order in each."""
    x, y, x_test, y_test, generator = _digits(seed)
    orders = [torch.randperm(64, generator=generator) for _ in range(tasks)]
    return [Task(x[:, order], y, x_test[:, order], y_test, range(10)) for order in orders]


def split(tasks: int, seed: int, *, head_per_task: bool) -> list[Task]:
    """Two digits in each task, with two outputs of their own or with all ten for everyone."""
    x, y, x_test, y_test, _ = _digits(seed)
    sequence = []
    for task in range(tasks):
        train, test = y // 2 == task, y_test // 2 == task
        first = 2 * task if head_per_task else 0
        head = range(first, first + 2) if head_per_task else range(10)
        sequence.append(Task(x[train], y[train] - first, x_test[test], y_test[test] - first, head))
    return sequence


def _digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=generator)
    test, train = order[:TEST_SAMPLES], order[TEST_SAMPLES:]
    return x[train], y[train], x[test], y[test], generator


Optimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def momentum(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of all tables that are not about optimizers."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@dataclass
class Learner:
    """A network that learns one task after the other.

    Args:
        seed: Of the initial parameters and of the batches.
        steps: For each task, with 32 samples each, drawn with replacement.
        optimizer: From parameters to an optimizer, which is a new one for each task.
    """

    seed: int
    steps: int = 250
    optimizer: Optimizer = momentum

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = nn.Sequential(
            nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )
        self.generator = torch.Generator().manual_seed(self.seed)
        self.ewc: EWC | OnlineEWC | None = None

    def learn(self, task: Task) -> None:
        """Train on one task, with the penalty if there is one."""
        optimizer = self.optimizer(self.model.parameters())
        head = list(task.head)
        for _ in range(self.steps):
            chosen = torch.randint(len(task.x), (32,), generator=self.generator)
            loss = F.cross_entropy(self.model(task.x[chosen])[:, head], task.y[chosen])
            if self.ewc is not None:
                loss = loss + self.ewc()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def consolidate(self, task: Task) -> float:
        """Protect what was learned of a task, if there is an `ewc`; the largest curvature."""
        if self.ewc is None:
            return 0.0
        likelihood = Classification(allowed_outputs=list(task.head))
        return self.ewc.consolidate(task.batches(), likelihood=likelihood).largest

    @torch.no_grad()
    def accuracy(self, task: Task) -> float:
        """The share of a task's test data that is classified rightly; NaN after divergence."""
        largest = max(float(parameter.abs().max()) for parameter in self.model.parameters())
        if not largest < FAR:
            return float("nan")
        outputs = self.model(task.x_test)[:, list(task.head)]
        return float((outputs.argmax(1) == task.y_test).float().mean())
