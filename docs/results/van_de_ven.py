"""Which Fisher? Split MNIST with a head per task, after van de Ven (2025, arXiv 2502.11756).

Five tasks of two digits; 196-100-100-10; Adam 1e-3, 400 steps of 64 images per task; one quadratic
around the latest parameters (`OnlineEWC`), as in the paper. Every Fisher has the strength that is
best by validation, out of the same powers of ten. All labels are right, or 20 % of the training
labels are wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from _data import Part
from _intervals import estimate, paired
from _learning import Fisher, Learner, split
from _study import (
    IMAGES,
    SEEDS,
    TUNING_SEEDS,
    Store,
    Strength,
    Study,
    automatic,
    chosen,
    interleave,
    number,
    swept,
    table,
    tuned,
)
from torch import Tensor, nn

from ewc import diagonal_fisher

FISHERS: dict[str, Fisher] = {
    "exact": Fisher("exact"),
    "empirical": Fisher("empirical"),
    "batches of 128": Fisher(batch=128),
    "sampled": Fisher("mc"),
    "exact, 500 samples": Fisher("exact", max_samples=500),
}
NONE, JOINT = "none", "joint training"
DEFAULT = "empirical"
GRID = tuple(10.0**power for power in range(1, 9))
RELATIVE_GRID = (1.0, 10.0, 100.0, 1000.0)
"""k of strength = k / largest entry."""
CLEAN, NOISY = 0.0, 0.2
"""The share of wrong labels in the training data. Validation and test labels are right."""


def sequence(
    fisher: str, strength: Strength, seed: int, noise: float, quick: bool, *, relative: bool = False
) -> dict[str, Any]:
    """Learn the five tasks."""
    tasks = split(seed, samples=600 if quick else 10_000, noise=noise)
    steps = 5 if quick else 400
    learner = Learner(seed, steps, FISHERS.get(fisher), strength, relative, decay=1.0)
    return learner.joint(tasks) if fisher == JOINT else learner.sequence(tasks)


def run(store: Store, quick: bool) -> None:
    """All runs."""
    for noise in (CLEAN, NOISY):
        _run(store, noise, quick)
    store.run(lambda: seconds(quick), kind="seconds", seed=0)


def _run(store: Store, noise: float, quick: bool) -> None:
    """All runs with this share of wrong labels."""
    seeds, tuning = (SEEDS[:1], TUNING_SEEDS[:1]) if quick else (SEEDS, TUNING_SEEDS)

    def one(name: str, strength: Strength, seed: int) -> dict[str, Any]:
        return sequence(name, strength, seed, noise, quick)

    for name in (NONE, JOINT):
        for seed in seeds:
            store.run(lambda n=name, s=seed: one(n, 0.0, s), **key(name, noise), seed=seed)
    for name in FISHERS:
        tuned(
            store,
            GRID[:2] if quick else GRID,
            lambda strength, s, n=name: one(n, strength, s),
            seeds=seeds,
            tuning_seeds=tuning,
            **key(name, noise),
        )
    tuned(
        store,
        RELATIVE_GRID[:2] if quick else RELATIVE_GRID,
        lambda k, s: sequence(DEFAULT, k, s, noise, quick, relative=True),
        seeds=seeds,
        tuning_seeds=tuning,
        **key(DEFAULT, noise, "largest"),
    )
    for name in FISHERS:
        automatic(store, lambda k, s, n=name: one(n, k, s), seeds=seeds, **key(name, noise))


def key(name: str, noise: float, scale: str = "fixed") -> dict[str, Any]:
    """The fields of a contender's runs; `scale` is "largest" if strengths are k / largest entry."""
    return {"fisher": name, "scale": scale if name in FISHERS else "none", "noise": noise}


def one_at_a_time(model: nn.Module, part: Part, head: list[int], *, exact: bool) -> list[Tensor]:
    """The Fisher as most code computes it: a forward for each sample, a backward for each class."""
    parameters = list(model.parameters())
    totals = [torch.zeros_like(each) for each in parameters]
    for x, y in zip(part.x, part.y, strict=True):
        losses = -F.log_softmax(model(x[None])[0, head], 0)
        weights = (-losses.detach()).exp()
        for label in range(len(head)) if exact else [int(y)]:
            found = torch.autograd.grad(losses[label], parameters, retain_graph=exact)
            for total, each in zip(totals, found, strict=True):
                total += (weights[label] if exact else 1.0) * each.square()
    return [total / len(part.y) for total in totals]


def seconds(quick: bool) -> dict[str, Any]:
    """Processor seconds for the Fisher of one task, and for one ordinary pass over its data."""
    task = split(0, samples=300 if quick else 2_000)[1]
    learner = Learner(0, steps=5 if quick else 400)
    learner.learn(task)
    model = learner.model

    def ordinary() -> None:
        for x, y in Fisher().batches(task.train):
            F.cross_entropy(model(x)[:, task.head], y).backward()
        model.zero_grad()

    def ours(fisher: Fisher) -> Callable[[], object]:
        return lambda: diagonal_fisher(
            model,
            fisher.batches(task.train),
            fisher.likelihood(task.head),
            fisher_type=fisher.fisher_type,
            max_samples=fisher.max_samples,
        )

    contenders: dict[str, Callable[[], object]] = {"forward + backward": ordinary}
    contenders |= {name: ours(fisher) for name, fisher in FISHERS.items()}
    for name, exact in (("exact", True), ("empirical", False)):
        contenders[f"{name}, one at a time"] = lambda e=exact: one_at_a_time(
            model, task.train, task.head, exact=e
        )
    timings = interleave(contenders, 1 if quick else 3, clock=_processor_time)
    return {
        "samples": len(task.train.y),
        **{name: float(f"{timings.median(name):.3g}") for name in contenders},
    }


def _processor_time(timed: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        timed()
    return time.process_time() - start


def accuracies(store: Store, noise: float) -> str:
    """Each Fisher at its best strength."""
    reference = store.values("test", **key("exact", noise))
    rows = []
    for name in (NONE, *FISHERS, JOINT):
        values = store.values("test", **key(name, noise))
        rows.append(
            [
                name,
                _power(chosen(store, **key(name, noise))) if name in FISHERS else "-",
                estimate(values).text(),
                "-" if name == "exact" else paired(values, reference).text(sign=True),
                f"{100 * min(values):.1f}",
            ]
        )
    return table(["Fisher", "best strength", "accuracy, %", "minus exact", "worst seed"], rows)


def sweep(store: Store, noise: float) -> str:
    """Validation accuracy over strength."""
    rows = []
    for name in FISHERS:
        scores = swept(store, **key(name, noise))
        best = chosen(store, **key(name, noise))
        cells = {strength: f"{100 * score:.1f}" for strength, score in scores.items()}
        cells[best] = f"**{cells[best]}**"
        rows.append([name, *cells.values()])
    return table(["validation accuracy, %, at strength", *map(_power, scores)], rows)


def _power(strength: float) -> str:
    return f"{strength:.0e}".replace("e+0", "e")


def times(store: Store) -> str:
    """Seconds of each."""
    (found,) = store.select(kind="seconds")
    unit = found["forward + backward"]
    rows = []
    for name in ("forward + backward", *FISHERS):
        alone = found.get(f"{name}, one at a time")
        rows.append(
            [
                name,
                number(found[name]),
                number(found[name] / unit),
                "-" if alone is None else number(alone),
                "-" if alone is None else f"{alone / found[name]:.0f}",
            ]
        )
    head = ["Fisher", "seconds", "forward + backward = 1", "one sample at a time, s", "times ours"]
    return table(head, rows)


def tables(store: Store) -> Mapping[str, str]:
    """What the page shows."""
    return {
        "accuracy": accuracies(store, CLEAN),
        "noise": accuracies(store, NOISY),
        "seconds": times(store),
        "sweep": sweep(store, CLEAN),
        "noise sweep": sweep(store, NOISY),
    }


def draw(store: Store) -> None:
    """Validation accuracy over strength: what moves is where each Fisher is best."""
    from _plot import BLUE, GREEN, GREY, ORANGE, VERMILION, new_figure, save

    figure = new_figure(7.5, 4.2)
    axis = figure.subplots()
    colours = (BLUE, GREEN, VERMILION, ORANGE, "black")
    for name, colour, mark in zip(FISHERS, colours, "os^Dv", strict=True):
        scores = swept(store, **key(name, CLEAN))
        percent = [100 * score for score in scores.values()]
        axis.semilogx([*scores], percent, color=colour, marker=mark, label=name)
    none = 100 * estimate(store.values("test", **key(NONE, CLEAN))).mean
    axis.axhline(none, color=GREY, linestyle="--", label=f"{NONE} (test data)")
    axis.set(xlabel="strength", ylabel="accuracy over five tasks, %")
    axis.legend(frameon=False)
    save(figure, IMAGES / "results_van_de_ven.png")


STUDY = Study("van_de_ven", run, tables, draw)

if __name__ == "__main__":
    STUDY.main()
