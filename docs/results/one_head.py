"""Class-incremental with one head: EWC alone, replay alone, both.

Split MNIST: five tasks of two digits, and one head of ten outputs that is never told the task.
Replay: some images of each digit are stored, and half of what later tasks learn from are these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from _data import Part
from _intervals import estimate, paired
from _learning import Fisher, Learner, Task, split
from _study import SEEDS, TUNING_SEEDS, Store, Strength, Study, automatic, chosen, table, tuned

GRID = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
MEMORIES = (0, 10)
"""Stored images of each digit."""
STEPS = 200


def tasks(seed: int, samples: int = 5_000) -> list[Task]:
    """Split MNIST whose labels are the digits themselves, out of all ten."""
    found = []
    for task in split(seed, samples):
        first = task.head[0]
        parts = [Part(x, y + first) for x, y in (task.train, task.validation, task.test)]
        found.append(Task(*parts, list(range(10))))
    return found


@dataclass
class Rehearser(Learner):
    """A learner that stores some images of each digit, and learns them along with new ones.

    Attributes:
        memory: Stored images of each digit.
        stored: Those of the tasks so far.
    """

    memory: int = 0
    stored: list[Part] = field(init=False, default_factory=list)

    def learn(self, *tasks: Task) -> bool:
        """Train on a task and on what is stored of earlier ones, or on several tasks jointly."""
        if len(tasks) > 1:
            return super().learn(*tasks)
        (task,) = tasks
        stable = super().learn(task._replace(train=self._with_stored(task.train)))
        if self.memory:
            kept = [
                (task.train.y == one).nonzero()[: self.memory, 0] for one in task.train.y.unique()
            ]
            self.stored.append(task.train.where(torch.cat(kept)))
        return stable

    def _with_stored(self, new: Part) -> Part:
        """The new images, and the stored ones so often that half of all draws are of these."""
        if not self.stored:
            return new
        x, y = (torch.cat(each) for each in zip(*self.stored, strict=True))
        again = torch.arange(len(new.y)) % len(y)
        return Part(torch.cat([new.x, x[again]]), torch.cat([new.y, y[again]]))


def run(store: Store, quick: bool) -> None:
    """All runs; the quick form has two seeds, few steps and one strength."""
    steps, seeds, grid = (5, SEEDS[:2], GRID[:1]) if quick else (STEPS, SEEDS, GRID)
    fisher = Fisher("empirical", max_samples=1000)

    def learner(seed: int, **options: Any) -> Mapping[str, Any]:
        return Rehearser(seed, steps, **options).sequence(tasks(seed))

    for memory in MEMORIES:

        def protected(k: Strength, seed: int, memory: int = memory) -> Mapping[str, Any]:
            return learner(seed, memory=memory, fisher=fisher, strength=k, relative=True)

        for seed in seeds:
            store.run(
                lambda s=seed, m=memory: learner(s, memory=m), ewc=False, memory=memory, seed=seed
            )
        key = {"ewc": True, "memory": memory}
        tuned(store, grid, protected, seeds=seeds, tuning_seeds=TUNING_SEEDS[:2], **key)
        automatic(store, protected, seeds=seeds, **key)
    for seed in seeds:
        store.run(lambda s=seed: Learner(s, steps).joint(tasks(s)), ewc="joint", seed=seed)


def tables(store: Store) -> dict[str, str]:
    """By name."""
    head = ["stored images of each digit", "without EWC", "with EWC", "difference", "best k"]
    head += ["first task, without", "with", "last task, without", "with"]
    rows = []
    for memory in MEMORIES:
        k = chosen(store, ewc=True, memory=memory)
        plain = {"ewc": False, "memory": memory}
        ours = {"ewc": True, "memory": memory, "strength": k}
        found = [store.values("test", **key) for key in (plain, ours)]
        cells = [estimate(each).text(digits=1) for each in found]
        cells += [paired(found[1], found[0]).text(digits=1, sign=True), f"{k:g}"]
        for index in (0, -1):
            for key in (plain, ours):
                values = [one[index] for one in store.values("tasks", **key)]
                cells.append(estimate(values).text(digits=1))
        rows.append([str(memory) if memory else "none", *cells])
    joint = estimate(store.values("test", ewc="joint")).text(digits=1)
    rows.append(["joint training", joint, *[""] * 7])
    return {"table": table(head, rows)}


STUDY = Study("one_head", run, tables)


if __name__ == "__main__":
    STUDY.main()
