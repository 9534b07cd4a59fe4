"""Ten permuted MNISTs: how near is EWC to joint training, and one term per task or one quadratic?

After Kirkpatrick et al. (2017), Huszár (2018) and Schwarz et al. (2018). All ten digits in every
task, one head; 196-100-100-10; 200 steps of 64 images per task, drawn from 5,000, with SGD (0.05,
momentum 0.9) or Adam (1e-3). strength = k / largest entry, k by validation, four k for each method.
A few runs have 784-400-400-10 and 1,000 steps per task, nearer to the papers.
And the case in which everything is known: regressions whose Fisher is diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from _closed_form import WAYS, distances
from _intervals import estimate, paired
from _learning import SIDE, Fisher, Learner, Optimizer, adam, permuted, sgd
from _study import (
    IMAGES,
    SEEDS,
    TUNING_SEEDS,
    Store,
    Strength,
    Study,
    automatic,
    chosen,
    swept,
    table,
    tuned,
)

BATCH = 64
TASKS = 10
LENGTHS = (2, 5, TASKS)


@dataclass(frozen=True)
class Size:
    """Of a network, its training and its report.

    Attributes:
        side: Of the images, in pixels.
        hidden: The width of both hidden layers.
        steps: Per task.
        samples: Training images per task.
        seeds: Of the report.
        tuning_seeds: Of the choice of k.
    """

    side: int = SIDE
    hidden: int = 100
    steps: int = 200
    samples: int = 5_000
    seeds: tuple[int, ...] = SEEDS
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS[:2]

    @property
    def quick(self) -> Size:
        """The quick form: a few steps and one seed."""
        return replace(
            self, steps=5, samples=500, seeds=self.seeds[:1], tuning_seeds=self.tuning_seeds[:1]
        )


SMALL = Size()
LARGE = Size(28, 400, 1_000, 20_000, SEEDS[:3], TUNING_SEEDS[:1])


@dataclass(frozen=True)
class Method:
    """What learns.

    Attributes:
        fisher: None for no penalty.
        grid: k of strength = k / largest entry.
        decay: None for `EWC`, else that of `OnlineEWC`.
        prior: `prior_precision` of `OnlineEWC`.
        optimizer: From parameters to an optimizer.
        size: Of the network and its training.
        joint: It learns all tasks at once.
    """

    fisher: Fisher | None = None
    grid: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0)
    decay: float | None = None
    prior: float = 0.0
    optimizer: Optimizer = sgd
    size: Size = SMALL
    joint: bool = False


ADAM = (1.0, 10.0, 100.0, 1000.0)
LOWER = (0.3, 1.0, 3.0, 10.0)
NONE, JOINT = "none", "joint training"
EWC, MEANS, L2, ONLINE = "EWC", f"EWC, batches of {BATCH}", "L2 pull", "OnlineEWC"
METHODS: dict[str, Method] = {
    NONE: Method(),
    EWC: Method(Fisher()),
    MEANS: Method(Fisher(batch=BATCH)),
    L2: Method(Fisher(max_samples=1), (0.003, 0.01, 0.03, 0.1), decay=0.0, prior=1.0),
    ONLINE: Method(Fisher(), decay=1.0),
    f"{ONLINE}, decay 0.5": Method(Fisher(), decay=0.5),
    f"{NONE}, Adam": Method(optimizer=adam),
    f"{EWC}, Adam": Method(Fisher(), ADAM, optimizer=adam),
    f"{ONLINE}, Adam": Method(Fisher(), ADAM, decay=1.0, optimizer=adam),
    JOINT: Method(joint=True),
    f"{NONE}, large": Method(size=LARGE),
    f"{EWC}, large": Method(Fisher(), LOWER, size=LARGE),
    f"{JOINT}, large": Method(size=LARGE, joint=True),
}
AUTO = (EWC, ONLINE, f"{EWC}, Adam", f"{ONLINE}, Adam")
"""What is also run with `strength="auto"`."""


def learner(name: str, strength: Strength, seed: int, size: Size) -> Learner:
    """A network and what protects it."""
    method = METHODS[name]
    return Learner(
        seed,
        steps=size.steps,
        fisher=method.fisher,
        strength=strength,
        relative=True,
        decay=method.decay,
        prior=method.prior,
        optimizer=method.optimizer,
        hidden=size.hidden,
        batch=BATCH,
        side=size.side,
    )


def sequence(name: str, strength: Strength, seed: int, quick: bool) -> dict[str, Any]:
    """Learn the ten tasks."""
    method = METHODS[name]
    size = method.size.quick if quick else method.size
    count, scored = (3, 200) if quick else (TASKS, 1_000)
    tasks = permuted(count, seed, size.samples, scored, size.side)
    one = learner(name, strength, seed, size)
    return one.joint(tasks) if method.joint else one.sequence(tasks)


def run(store: Store, quick: bool) -> None:
    """All runs."""
    for seed in SEEDS[:1] if quick else SEEDS:
        store.run(lambda s=seed: distances(s, TASKS), kind="closed form", seed=seed)
        store.run(lambda s=seed: two_tasks(s, quick), kind="two tasks", seed=seed)
    for name, method in METHODS.items():
        size = method.size.quick if quick else method.size
        if method.fisher is None:
            for seed in size.seeds:
                store.run(lambda n=name, s=seed: sequence(n, 0.0, s, quick), **key(name), seed=seed)
        else:
            tuned(
                store,
                method.grid[:2] if quick else method.grid,
                lambda k, s, n=name: sequence(n, k, s, quick),
                seeds=size.seeds,
                tuning_seeds=size.tuning_seeds,
                **key(name),
            )
    for name in AUTO:
        size = METHODS[name].size.quick if quick else METHODS[name].size
        automatic(
            store, lambda k, s, n=name: sequence(n, k, s, quick), seeds=size.seeds, **key(name)
        )


def two_tasks(seed: int, quick: bool) -> dict[str, Any]:
    """The largest difference of a parameter between both ways, after each of three tasks."""
    size = SMALL.quick if quick else SMALL
    tasks = permuted(3, seed, size.samples)
    learners = [learner(name, 10.0, seed, size) for name in (EWC, ONLINE)]
    found = []
    for task in tasks:
        for each in learners:
            each.learn(task)
            each.consolidate(task)
        pairs = zip(*(each.model.parameters() for each in learners), strict=True)
        found.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
    return {"difference": found}


def key(name: str) -> dict[str, str]:
    """The fields of a method's runs."""
    return {"method": name, "scale": "none" if METHODS[name].fisher is None else "largest"}


def after(store: Store, name: str, tasks: int) -> list[float]:
    """The mean accuracy over the first tasks, right after them, of every seed."""
    return [one[min(tasks, len(one)) - 1] for one in store.values("after", **key(name))]


def _row(store: Store, name: str, reference: str) -> list[str]:
    """Best k, accuracy over T, the difference at the end, first and last task."""
    values, unit = (store.values("test", **key(each)) for each in (name, reference))
    difference = "-" if name == reference else paired(values, unit).text(digits=1, sign=True)
    if METHODS[name].joint:
        end = estimate(values).text(digits=1)
        return [name, "-", *["-"] * (len(LENGTHS) - 1), end, difference, "-", "-"]
    every = store.values("tasks", **key(name))
    return [
        name,
        f"{chosen(store, **key(name)):g}" if METHODS[name].fisher else "-",
        *(estimate(after(store, name, tasks)).text(digits=1) for tasks in LENGTHS),
        difference,
        *(estimate([one[t] for one in every]).text(digits=1) for t in (0, -1)),
    ]


def _head(reference: str) -> list[str]:
    lengths = [f"after {n}, %" for n in LENGTHS]
    return ["", "best k", *lengths, f"minus {reference}", "first task", "last task"]


def joint(store: Store) -> str:
    """Each Fisher, and the gap to joint training."""
    rows = [_row(store, name, JOINT) for name in (NONE, L2, MEANS, EWC, JOINT)]
    return table(_head(JOINT), rows)


def large(store: Store) -> str:
    """The same, nearer to the size of the papers."""
    reference = f"{JOINT}, large"
    names = [f"{name}, large" for name in (NONE, EWC)]
    return table(_head(JOINT), [_row(store, name, reference) for name in (*names, reference)])


def online(store: Store) -> str:
    """One term for each task, or one quadratic."""
    sgd_names = [EWC, ONLINE, f"{ONLINE}, decay 0.5"]
    rows = [_row(store, name, EWC) for name in sgd_names]
    adam_names = [name for name in METHODS if name.endswith("Adam")]
    rows += [_row(store, name, f"{EWC}, Adam") for name in adam_names]
    return table(_head("EWC"), rows)


def gap(store: Store) -> str:
    """What EWC gains over the others, seed by seed."""
    ours = store.values("test", **key(EWC))
    others = {name: store.values("test", **key(name)) for name in (NONE, L2, MEANS)}
    rows = [[n, paired(ours, values).text(digits=1, sign=True)] for n, values in others.items()]
    return table(["EWC minus", "points"], rows)


def sweep(store: Store) -> str:
    """Validation accuracy over k."""
    rows = []
    for name, method in METHODS.items():
        if method.fisher is not None:
            scores = swept(store, **key(name)).items()
            rows.append([name, *(f"{100 * score:.1f} ({k:g})" for k, score in scores)])
    return table(["", *["accuracy, % (k)"] * (len(rows[0]) - 1)], rows)


def closed_form(store: Store) -> str:
    """The two ways where nothing is estimated."""
    rows = []
    for name in WAYS:
        every = store.values(name, kind="closed form")
        cells = (estimate([one[n - 1] for one in every]).text(digits=1) for n in (1, *LENGTHS))
        rows.append([f"{name}: distance, %", *cells])
    return table(["", *(f"T = {n}" for n in (1, *LENGTHS))], rows)


def identity(store: Store) -> str:
    """The two ways on networks."""
    every = store.values("difference", kind="two tasks")
    cells = [f"{max(one[t] for one in every):.2g}" for t in range(3)]
    head = ["", *(f"T = {t}" for t in (1, 2, 3))]
    return table(head, [["the largest difference of a parameter, of all seeds", *cells]])


TABLES = (joint, gap, large, online, sweep, closed_form, identity)


def tables(store: Store) -> Mapping[str, str]:
    """What the page shows."""
    return {one.__name__.replace("_", " "): one(store) for one in TABLES}


def draw(store: Store) -> None:
    """The mean accuracy over the tasks so far, while they are learned."""
    from _plot import BLUE, GREEN, GREY, ORANGE, VERMILION, new_figure, save

    figure = new_figure(7.5, 4.2)
    axis = figure.subplots()
    colours = {ONLINE: "black", EWC: BLUE, MEANS: ORANGE, L2: GREEN, NONE: VERMILION}
    for name, colour in colours.items():
        every = zip(*store.values("after", **key(name)), strict=True)
        found = [estimate(each) for each in every]
        tasks = range(1, len(found) + 1)
        axis.plot(tasks, [100 * one.mean for one in found], color=colour, marker="o", label=name)
        low, high = ([100 * (one.mean + s * one.half) for one in found] for s in (-1, 1))
        axis.fill_between(tasks, low, high, color=colour, alpha=0.2, linewidth=0)
    together = 100 * estimate(store.values("test", **key(JOINT))).mean
    axis.axhline(together, color=GREY, linestyle="--", label=f"{JOINT} of all ten")
    axis.set(xlabel="tasks learned", ylabel="mean accuracy over them, %")
    axis.legend(frameon=False)
    save(figure, IMAGES / "results_permuted.png")


STUDY = Study("permuted", run, tables, draw)

if __name__ == "__main__":
    STUDY.main()
