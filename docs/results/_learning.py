"""Tasks made of MNIST, a network that learns them in turn, and ways to estimate its Fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from _data import Part, mnist
from _study import Strength
from torch import Tensor, nn

from ewc import EWC, Classification, Custom, Likelihood, OnlineEWC

SIDE = 14
"""Images of 14 x 14 pixels, the mean of every two by two: a quarter of the time."""
FAR = 1e3
"""No parameter comes near this; one that does is on its way to infinity."""


class Task(NamedTuple):
    """Labels count from 0 within `head`, the outputs that are this task's."""

    train: Part
    validation: Part
    test: Part
    head: list[int]


def split(seed: int, samples: int = 10_000, noise: float = 0.0) -> list[Task]:
    """Split MNIST: 0 and 1, then 2 and 3, and so on, with two outputs for each task.

    Args:
        seed: Of what is drawn.
        samples: The most training images per task; a task has about 10,000.
        noise: The share of training labels that are the other one of the two.
    """
    generator = torch.Generator().manual_seed(seed)
    data = mnist(SIDE)
    tasks = []
    for first in range(0, 10, 2):
        parts = []
        for part in data:
            chosen = part.where(part.y // 2 == first // 2)
            parts.append(Part(chosen.x, chosen.y - first))
        train = parts[0].where(torch.randperm(len(parts[0].y), generator=generator)[:samples])
        wrong = torch.rand(len(train.y), generator=generator) < noise
        train = Part(train.x, torch.where(wrong, 1 - train.y, train.y))
        tasks.append(Task(train, *parts[1:], [first, first + 1]))
    return tasks


@lru_cache(maxsize=12)  # a seed's tasks are the same for every contender
def permuted(
    count: int, seed: int, samples: int = 5_000, scored: int = 1_000, side: int = SIDE
) -> list[Task]:
    """Permuted MNIST: all ten digits in every task, the pixels in another order in each.

    Args:
        count: How many tasks.
        seed: Of the orders and of what is drawn.
        samples: Training images per task.
        scored: Images to validate and to test by, per task.
        side: Of the images, in pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(count):
        order = torch.randperm(side**2, generator=generator)
        parts = []
        for part, most in zip(mnist(side), (samples, scored, scored), strict=True):
            drawn = part.where(torch.randperm(len(part.y), generator=generator)[:most])
            parts.append(Part(drawn.x[:, order], drawn.y))
        tasks.append(Task(*parts, list(range(10))))
    return tasks


@dataclass(frozen=True)
class Fisher:
    """A way to compute it.

    Attributes:
        fisher_type: As `EWC` has it.
        max_samples: As `EWC` has it.
        batch: How many samples' mean gradient is squared: 1, but for what others do.
    """

    fisher_type: Literal["empirical", "exact", "mc"] = "empirical"
    max_samples: int | None = None
    batch: int = 1

    def likelihood(self, head: Sequence[int]) -> Likelihood:
        """That of a task; what is one sample to it is a whole batch if `batch` says so."""
        if self.batch == 1:
            return Classification(allowed_outputs=head)

        def mean_nll(outputs: Tensor, y: Tensor) -> Tensor:
            logits = outputs[..., list(head)].transpose(1, 2)
            return F.cross_entropy(logits, y, reduction="none").mean(1)

        return Custom(mean_nll)

    def batches(self, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """The data, once, in order; what is left behind the last whole batch is dropped."""
        x, y = part
        if self.batch > 1:
            whole = len(y) // self.batch * self.batch
            x = x[:whole].view(-1, self.batch, x.shape[1])
            y = y[:whole].view(-1, self.batch)
        return zip(x.split(512), y.split(512), strict=True)


Optimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam, learning rate 0.001."""
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)  # the fastest on a CPU


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD, learning rate 0.05, momentum 0.9."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True)


@dataclass
class Learner:
    """A network that learns tasks in turn.

    Args:
        seed: Of the initial parameters and of the batches.
        steps: For each task.
        fisher: What protects a task; None for plain fine-tuning.
        strength: lambda, or `"auto"`.
        relative: `strength` is k, for lambda = k / largest entry after each consolidation.
        decay: None for `EWC`, else that of `OnlineEWC`.
        prior: `prior_precision` of `OnlineEWC`; with `decay` 0, an L2 pull to the latest anchor.
        optimizer: From parameters to an optimizer, a new one for each task.
        hidden: The width of both hidden layers.
        batch: Samples per step.
        side: Of the images, in pixels.
    """

    seed: int
    steps: int
    fisher: Fisher | None = None
    strength: Strength = "auto"
    relative: bool = False
    decay: float | None = None
    prior: float = 0.0
    optimizer: Optimizer = adam
    hidden: int = 100
    batch: int = 64
    side: int = SIDE
    regularizer: EWC | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        width = self.hidden
        self.model = nn.Sequential(
            *(nn.Linear(self.side**2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, 10),
        )
        self.generator = torch.Generator().manual_seed(self.seed)
        if self.fisher is not None:
            options: dict[str, Any] = {
                "strength": self.strength if self._plain else 0.0,
                "fisher_type": self.fisher.fisher_type,
                "max_samples": self.fisher.max_samples,
            }
            likelihood = self.fisher.likelihood(range(10))
            if self.decay is None:
                self.regularizer = EWC(self.model, likelihood, **options)
            else:
                options |= {"decay": self.decay, "prior_precision": self.prior}
                self.regularizer = OnlineEWC(self.model, likelihood, **options)

    @property
    def _plain(self) -> bool:
        """Whether `EWC` takes the strength as it is."""
        return self.strength == "auto" or not self.relative

    def learn(self, *tasks: Task) -> bool:
        """Train on a task, or on several jointly; whether the parameters stayed finite."""
        optimizer = self.optimizer(self.model.parameters())
        for step in range(self.steps * len(tasks)):
            task = tasks[step % len(tasks)]
            chosen = torch.randint(len(task.train.y), (self.batch,), generator=self.generator)
            x, y = task.train.where(chosen)
            loss = F.cross_entropy(self.model(x)[:, task.head], y)
            if self.regularizer is not None:
                loss = loss + self.regularizer()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 19 and not self._finite():
                return False
        return True

    def _finite(self) -> bool:
        return all(float(one.detach().abs().max()) < FAR for one in self.model.parameters())

    def consolidate(self, task: Task) -> None:
        """Protect a task."""
        if self.regularizer is None or self.fisher is None:
            return
        summary = self.regularizer.consolidate(
            self.fisher.batches(task.train), likelihood=self.fisher.likelihood(task.head)
        )
        if not self._plain:
            self.regularizer.strength = self.strength / summary.largest

    @torch.no_grad()
    def accuracy(self, part: Part, head: Sequence[int]) -> float:
        """The share of the samples whose class is the most probable one of a head."""
        found = self.model(part.x)[:, list(head)].argmax(1)
        return float((found == part.y).float().mean())

    def sequence(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Learn all tasks.

        Returns:
            `validation` and `test`: the mean accuracy over all tasks at the end; `after`: the mean
            test accuracy over the tasks so far, after each; `tasks`: each task's test accuracy at
            the end; `learned`: after each task, its own; `lambda`: the strength after each task;
            `diverged`. A run that diverges has accuracy 0.
        """
        after, learned, strengths = [], [], []
        for t, task in enumerate(tasks):
            if not self.learn(task):
                zeros = [0.0] * len(tasks)
                return {
                    **{"validation": 0.0, "test": 0.0, "after": zeros, "tasks": zeros},
                    **{"learned": zeros, "lambda": strengths, "diverged": True},
                }
            scores = [self.accuracy(one.test, one.head) for one in tasks[: t + 1]]
            after.append(round(sum(scores) / len(scores), 5))
            learned.append(round(scores[-1], 5))
            self.consolidate(task)
            strengths.append(
                0.0 if self.regularizer is None else float(f"{self.regularizer.strength:.4g}")
            )
        validation = [self.accuracy(one.validation, one.head) for one in tasks]
        return {
            "validation": round(sum(validation) / len(tasks), 5),
            "test": after[-1],
            "after": after,
            "tasks": [round(one, 5) for one in scores],
            "learned": learned,
            "lambda": strengths,
            "diverged": False,
        }

    def joint(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Learn all tasks at once, with the steps of all: what no sequence is expected to beat."""
        self.learn(*tasks)
        parts = ("validation", "test")
        return {
            part: round(
                sum(self.accuracy(getattr(one, part), one.head) for one in tasks) / len(tasks), 5
            )
            for part in parts
        }
