"""EWC-DR ("EWC Done Right", Liu & Chang 2026, arXiv 2603.18596) beside a per-sample Fisher.

The protocol is that of its code, which is PyCIL's: class-incremental, one growing head; each task
trains the outputs of its own classes alone; one quadratic around the latest parameters; SGD with
momentum. Every importance is summed over tasks, and strength = k / largest entry: one scale for
all. Two digits per task; ten tasks have the ten digits and their negatives as twenty classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _data import Part, mnist
from _intervals import estimate, paired
from _learning import FAR, SIDE
from _protection import protected
from _study import SEEDS, TUNING_SEEDS, Store, Strength, Study, automatic, chosen, table, tuned
from torch import Tensor, nn

from ewc import Classification, Custom, FisherType, Likelihood, diagonal_fisher

STEPS, BATCH, LR, MOMENTUM = 100, 32, 0.05, 0.9
SAMPLES = 512  # training images per class, and all that an importance is computed from
SCORED = 100  # images per class to validate and to test by
FISHER_BATCH = 128
CLIP = 1e-4
"""`fishermax` and `omegamax` of the published code."""
GRID = (0.02, 0.2, 2.0, 10.0, 50.0)
"""SGD's limit is 2 (1 + MOMENTUM) / LR = 76."""
L2_GRID = (1e-4, 1e-3, 0.01, 0.1, 1.0)
SETTINGS = {
    "MLP, 5 tasks": ("MLP", 5),
    "MLP, 10 tasks": ("MLP", 10),
    "CNN, 5 tasks": ("CNN", 5),
    "CNN, 10 tasks": ("CNN", 10),
}


class Importance(NamedTuple):
    """What is squared, and how."""

    fisher_type: FisherType = "empirical"
    reversed_logits: bool = False
    batch: int = 1
    clip: float | None = None


NONE, L2 = "none", "L2"
IMPORTANCES: dict[str, Importance] = {
    "Fisher, empirical": Importance(),
    "Fisher, exact": Importance("exact"),
    "EWC-DR, samples": Importance(reversed_logits=True),
    "EWC-DR, as published": Importance(reversed_logits=True, batch=FISHER_BATCH, clip=CLIP),
    "PyCIL's EWC": Importance(batch=FISHER_BATCH, clip=CLIP),
}
AUTO = ("Fisher, empirical", "Fisher, exact")
"""What is also run with `strength="auto"`."""


class Task(NamedTuple):
    """Labels are those of all classes; `classes` are this task's."""

    train: Part
    validation: Part
    test: Part
    classes: range


def tasks(count: int, seed: int) -> list[Task]:
    """Two digits each; from the sixth task on, the negatives."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for task in range(count):
        parts: list[list[Part]] = [[], [], []]
        for label in (2 * task, 2 * task + 1):
            sizes = (SAMPLES, SCORED, SCORED)
            for part, data, size in zip(parts, mnist(SIDE), sizes, strict=True):
                some = (data.y == label % 10).nonzero()[:, 0]
                some = some[torch.randperm(len(some), generator=generator)[:size]]
                x = 1 - data.x[some] if label >= 10 else data.x[some]
                part.append(Part(x, torch.full((size,), label)))
        joined = [Part(*map(torch.cat, zip(*part, strict=True))) for part in parts]
        found.append(Task(*joined, range(2 * task, 2 * task + 2)))
    return found


def network(kind: str, classes: int) -> nn.Module:
    """A small MLP or CNN."""
    if kind == "MLP":
        layers: list[nn.Module] = [nn.Linear(SIDE**2, 100), nn.ReLU(), nn.Linear(100, 100)]
        return nn.Sequential(*layers, nn.ReLU(), nn.Linear(100, classes))
    convolutions: list[nn.Module] = [nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU()]
    convolutions += [nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(nn.Unflatten(1, (1, SIDE, SIDE)), *convolutions, nn.Linear(256, classes))


def likelihood(importance: Importance, known: int) -> Likelihood:
    """Of the `known` classes so far; a batch is one sample if `importance` squares its mean."""
    if not importance.reversed_logits and importance.batch == 1:
        return Classification(allowed_outputs=range(known))
    sign = -1 if importance.reversed_logits else 1

    def nll(outputs: Tensor, y: Tensor) -> Tensor:
        logits = sign * outputs[..., :known]
        if importance.batch == 1:
            return F.cross_entropy(logits, y, reduction="none")
        return F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1)

    return Custom(nll)


class _DivergedError(Exception):
    """The parameters are on their way to infinity."""


@dataclass
class Learner:
    """A network that learns tasks in turn.

    Args:
        kind: Of the network.
        seed: Of the initial parameters and of the batches.
        steps: For each task.
        name: The importance; `NONE` and `L2` are none.
        k: strength = k / largest entry; or `"auto"`.
    """

    kind: str
    seed: int
    steps: int
    name: str = NONE
    k: Strength = 0.0

    def sequence(self, tasks: list[Task]) -> dict[str, Any]:
        """Learn all tasks.

        Returns:
            `validation` and `test`: the accuracy over all classes at the end; `average`: the mean
            over tasks of the accuracy over the classes so far; `last`: that of the last task alone.
            A run that diverges has accuracy 0.
        """
        try:
            return self._sequence(tasks)
        except _DivergedError:
            return dict.fromkeys(("validation", "test", "average", "last"), 0.0)

    def _sequence(self, tasks: list[Task]) -> dict[str, Any]:
        torch.manual_seed(self.seed)
        model = network(self.kind, 2 * len(tasks))
        generator = torch.Generator().manual_seed(self.seed)
        penalty: Callable[[], Tensor | float] = float
        total: dict[str, Tensor] = {}
        after = []
        for index, task in enumerate(tasks):
            optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
            own = slice(task.classes.start, task.classes.stop)
            for _ in range(self.steps):
                some = torch.randint(len(task.train.y), (BATCH,), generator=generator)
                x, y = task.train.where(some)
                loss = F.cross_entropy(model(x)[:, own], y - own.start) + penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if not all(float(one.detach().abs().max()) < FAR for one in model.parameters()):
                raise _DivergedError
            after.append(_accuracy(model, [one.test for one in tasks[: index + 1]]))
            if self.name != NONE:
                for name, one in self._importance(model, task).items():
                    total[name] = total.get(name, 0) + one
                penalty = protected(model, Classification(), total, self._strength(total))
        return {
            "validation": _accuracy(model, [one.validation for one in tasks]),
            "test": after[-1],
            "average": round(sum(after) / len(after), 5),
            "last": _accuracy(model, [tasks[-1].test], 2 * len(tasks)),
        }

    def _strength(self, total: Mapping[str, Tensor]) -> Strength:
        if self.k == "auto":
            return "auto"
        return self.k / max(float(one.max()) for one in total.values())

    def _importance(self, model: nn.Module, task: Task) -> Mapping[str, Tensor]:
        if self.name == L2:
            return {name: torch.ones_like(one) for name, one in model.named_parameters()}
        importance = IMPORTANCES[self.name]
        known = task.classes.stop
        order = torch.randperm(
            len(task.train.y), generator=torch.Generator().manual_seed(self.seed)
        )
        x, y = task.train.where(order)
        forward = None
        if importance.batch > 1:
            x = x.view(-1, importance.batch, x.shape[1])
            y = y.view(-1, importance.batch)

            def forward(model: nn.Module, batch: Any) -> Tensor:
                return model(batch[0].flatten(0, 1)).unflatten(0, batch[0].shape[:2])

        try:
            found = diagonal_fisher(
                model,
                zip(x.split(256), y.split(256), strict=True),
                likelihood(importance, known),
                fisher_type=importance.fisher_type,
                forward=forward,
            )
        except (
            ValueError
        ) as error:  # all entries are 0: the logits are so large that softmax is 0 or 1
            raise _DivergedError from error
        if importance.clip is None:
            return found
        return {name: one.clamp_max(importance.clip) for name, one in found.items()}


@torch.no_grad()
def _accuracy(model: nn.Module, parts: list[Part], known: int | None = None) -> float:
    """Over the classes of the parts, which are the first ones unless `known` says how many."""
    x, y = (torch.cat(each) for each in zip(*parts, strict=True))
    logits = model(x)[:, : known or int(y.max()) + 1]
    return round(float((logits.argmax(1) == y).float().mean()), 5)


def run(store: Store, quick: bool) -> None:
    """All runs; the quick form has two seeds, two tasks, few steps and one strength."""
    steps = 3 if quick else STEPS
    for setting, (kind, full) in SETTINGS.items():
        count = 2 if quick else full
        seeds = SEEDS[:2] if quick else SEEDS
        for seed in seeds:
            plain = Learner(kind, seed, steps)
            store.run(
                lambda p=plain, c=count: p.sequence(tasks(c, p.seed)),
                setting=setting,
                importance=NONE,
                seed=seed,
            )
        for name in (L2, *IMPORTANCES):

            def one(
                k: Strength, seed: int, name: str = name, kind: str = kind, n: int = count
            ) -> Any:
                return Learner(kind, seed, steps, name, k).sequence(tasks(n, seed))

            grid = L2_GRID if name == L2 else GRID
            grid = grid[:1] if quick else grid
            options = {"seeds": seeds, "tuning_seeds": TUNING_SEEDS[: 1 if quick else 3]}
            tuned(store, grid, one, **options, setting=setting, importance=name)
            if name in AUTO:
                automatic(store, one, seeds=seeds, setting=setting, importance=name)


def tables(store: Store) -> dict[str, str]:
    """By name."""
    return {name: _table(store, name) for name in ("last", "average", "strength")}


def _table(store: Store, field: str) -> str:
    """One row for each importance, one column for each setting whose runs are there."""
    names = (NONE, L2, *IMPORTANCES)
    settings = [
        setting
        for setting in SETTINGS
        if all(store.select(setting=setting, importance=one, seed=SEEDS[0]) for one in names)
    ]
    rows = []
    for name in names:
        cells = []
        for setting in settings:
            key: dict[str, Any] = {"setting": setting, "importance": name}
            if name != NONE:
                key["strength"] = chosen(store, **key)
            if field == "strength":
                cells.append(f"{key.get('strength', 0):g}")
                continue
            values = store.values({"last": "test"}.get(field, field), **key)
            cells.append(estimate(values).text(digits=1))
            if field == "last" and name != NONE:
                base = {"setting": setting, "importance": "Fisher, empirical"}
                base_values = store.values("test", **base, strength=chosen(store, **base))
                cells[-1] += f" ({paired(values, base_values).text(digits=1, sign=True)})"
        rows.append([name, *cells])
    return table(["importance", *settings], rows)


STUDY = Study("ewc_dr", run, tables)


if __name__ == "__main__":
    STUDY.main()
