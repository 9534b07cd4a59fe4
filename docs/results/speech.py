"""Speech: an LSTM learns to tell speakers apart, three at a time.

JapaneseVowels: two vowels by nine speakers, 7 to 29 steps of 12 coefficients. Three tasks of three
speakers, with three outputs each. The network says after every step who speaks; utterances are
padded, and a mask says which steps there are: in the loss, and in the Fisher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from _data import Spoken, vowels
from _intervals import estimate, paired
from _protection import protected
from _study import SEEDS, TUNING_SEEDS, Store, Strength, Study, automatic, chosen, table, tuned
from torch import Tensor, nn

from ewc import EWC, Classification, TimeSeries

FISHERS: tuple[Literal["empirical", "exact", "mc"], ...] = ("empirical", "exact", "mc")
NAMES = {"empirical": "EWC, empirical", "exact": "EWC, exact", "mc": "EWC, sampled", "L2": "L2"}
GRID = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
L2_GRID = (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)
STEPS, BATCH, LR = 150, 16, 5e-3
VALIDATED = 10  # of a speaker's 30 utterances


class Utterances(NamedTuple):
    """`x` is [N, S, 12], `y` and `mask` are [N, S]: who speaks, and which steps there are."""

    x: Tensor
    y: Tensor
    mask: Tensor

    def part(self, chosen: Tensor) -> Utterances:
        """Some of the utterances."""
        return Utterances(*(one[chosen] for one in self))


class Task(NamedTuple):
    """Speakers are counted from 0 within `head`, the outputs that are theirs."""

    train: Utterances
    validation: Utterances
    test: Utterances
    head: list[int]


class Listener(nn.Module):
    """Who speaks, after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 32, batch_first=True)
        self.out = nn.Linear(32, 9)

    def forward(self, x: Tensor) -> Tensor:
        """From `[N, S, 12]` to `[N, S, 9]`."""
        return self.out(self.lstm(x)[0])


def tasks(seed: int) -> list[Task]:
    """Three times three speakers; a third of the training data is for validation."""
    generator = torch.Generator().manual_seed(seed)
    train, test = vowels()
    order = torch.randperm(9, generator=generator)
    found = []
    for speakers, head in zip(order.view(3, 3), torch.arange(9).view(3, 3), strict=True):
        parts: list[list[Utterances]] = [[], [], []]
        for label, speaker in enumerate(speakers):
            mine = (train.y == speaker).nonzero()[:, 0]
            mine = mine[torch.randperm(len(mine), generator=generator)]
            tested = (test.y == speaker).nonzero()[:, 0]
            chosen_ = (mine[VALIDATED:], mine[:VALIDATED], tested)
            for part, data, which in zip(parts, (train, train, test), chosen_, strict=True):
                part.append(_utterances(data, which, label))
        joined = [Utterances(*map(torch.cat, zip(*part, strict=True))) for part in parts]
        found.append(Task(*joined, head.tolist()))
    return found


def _utterances(data: Spoken, chosen: Tensor, label: int) -> Utterances:
    longest = 29
    x = F.pad(data.x, (0, 0, 0, longest - data.x.shape[1]))[chosen]
    mask = torch.arange(longest) < data.lengths[chosen, None]
    return Utterances(x, torch.full(mask.shape, label), mask)


class Learner:
    """An LSTM that learns tasks in turn.

    Args:
        seed: Of the initial parameters and of the batches.
        steps: For each task.
        fisher: `fisher_type`, `"L2"`, or None for plain fine-tuning.
        k: strength = k / largest entry, after each task; or `"auto"`.
    """

    def __init__(self, seed: int, steps: int, fisher: str | None = None, k: Strength = 0.0) -> None:
        torch.manual_seed(seed)
        self.model = Listener()
        self.generator = torch.Generator().manual_seed(seed)
        self.steps, self.fisher, self.k = steps, fisher, k
        self.penalty: Callable[[], Tensor | float] = float
        if fisher in FISHERS:
            likelihood = TimeSeries(Classification(), batch_first=True)
            strength: Strength = "auto" if k == "auto" else 0.0
            self.penalty = EWC(self.model, likelihood, strength=strength, fisher_type=fisher)

    def learn(self, *tasks: Task) -> None:
        """Train on a task, or on several jointly."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=LR)
        for step in range(self.steps * len(tasks)):
            task = tasks[step % len(tasks)]
            batch = task.train.part(
                torch.randint(len(task.train.x), (BATCH,), generator=self.generator)
            )
            logits = self.model(batch.x)[..., task.head]
            loss = F.cross_entropy(logits[batch.mask], batch.y[batch.mask]) + self.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def consolidate(self, task: Task) -> None:
        """Protect a task."""
        if isinstance(self.penalty, EWC) and self.fisher != "L2":
            head = TimeSeries(Classification(allowed_outputs=task.head), batch_first=True)
            summary = self.penalty.consolidate([tuple(task.train)], likelihood=head)
            if self.k != "auto":
                self.penalty.strength = self.k / summary.largest
        elif self.fisher == "L2":
            ones = {name: torch.ones_like(one) for name, one in self.model.named_parameters()}
            self.penalty = protected(self.model, Classification(), ones, self.k)

    @torch.no_grad()
    def accuracy(self, part: Utterances, head: Sequence[int]) -> float:
        """The share of utterances whose speaker has the highest mean log-probability."""
        scores = self.model(part.x)[..., list(head)].log_softmax(-1) * part.mask[..., None]
        return float((scores.sum(1).argmax(1) == part.y[:, 0]).float().mean())

    def sequence(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Learn all tasks, and say how well each is known at the end, and was when learned."""
        learned = []
        for task in tasks:
            self.learn(task)
            learned.append(round(self.accuracy(task.test, task.head), 5))
            self.consolidate(task)
        return {**self.scores(tasks), "learned": learned}

    def scores(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Mean accuracies over the tasks, and the test accuracy of each."""
        each = [round(self.accuracy(one.test, one.head), 5) for one in tasks]
        validation = [self.accuracy(one.validation, one.head) for one in tasks]
        return {
            "validation": round(sum(validation) / len(tasks), 5),
            "test": round(sum(each) / len(tasks), 5),
            "tasks": each,
        }

    def joint(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Learn all tasks at once, with the steps of all."""
        self.learn(*tasks)
        return self.scores(tasks)


def run(store: Store, quick: bool) -> None:
    """All runs; the quick form has two seeds, few steps and one strength."""
    steps, seeds = (5, SEEDS[:2]) if quick else (STEPS, SEEDS)
    for seed in seeds:
        store.run(lambda s=seed: Learner(s, steps).sequence(tasks(s)), method="none", seed=seed)
        store.run(lambda s=seed: Learner(s, steps).joint(tasks(s)), method="joint", seed=seed)
    for name in NAMES:

        def learner(k: Strength, seed: int, name: str = name) -> Mapping[str, Any]:
            return Learner(seed, steps, name, k).sequence(tasks(seed))

        grid = L2_GRID if name == "L2" else GRID
        grid = grid[:1] if quick else grid
        options = {"seeds": seeds, "tuning_seeds": TUNING_SEEDS[:2]}
        tuned(store, grid, learner, **options, method=name)
        if name in FISHERS:
            automatic(store, learner, seeds=seeds, method=name)


def tables(store: Store) -> dict[str, str]:
    """By name."""
    head = ["", "best k", "average", "beside none", "first task", "second task", "last task"]
    rows = []
    none = store.values("test", method="none")
    for name in ("none", *NAMES, "joint"):
        key: dict[str, Any] = {"method": name}
        if name in NAMES:
            key["strength"] = chosen(store, **key)
        values = store.values("test", **key)
        each = zip(*store.values("tasks", **key), strict=True)
        rows.append(
            [
                NAMES.get(name, {"joint": "joint training"}.get(name, name)),
                f"{key['strength']:g}" if name in NAMES else "",
                estimate(values).text(digits=1),
                "" if name == "none" else paired(values, none).text(digits=1, sign=True),
                *(estimate(one).text(digits=1) for one in each),
            ]
        )
    return {"table": table(head, rows)}


STUDY = Study("speech", run, tables)


if __name__ == "__main__":
    STUDY.main()
