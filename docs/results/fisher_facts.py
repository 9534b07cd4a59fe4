"""Facts about the Fisher information that every strength depends on, each as a small table.

The trace against the batch whose mean gradient is squared; the empirical, the exact and the sampled
Fisher over training time; squares in half precision; and a linear regression, where the full
Fisher is joint training and its diagonal is not. 196-100-100-10 on 1,000 images of MNIST.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _data import Part
from _intervals import estimate
from _learning import Fisher, Learner, Task, permuted
from _study import IMAGES, SEEDS, Store, Study, table
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ewc import Regression, diagonal_fisher

SAMPLES = 1024
BATCHES = (1, 4, 16, 64, 256)
TIMES = (0, 30, 100, 300, 1000, 3000)
"""Steps of training, 64 images each."""
HALVES = (torch.float16, torch.bfloat16)


# Over training time, over batches ---------------------------------------------------------------


def fisher_of(model: nn.Module, data: Part, fisher: Fisher) -> Tensor:
    """All entries of a Fisher."""
    found = diagonal_fisher(
        model,
        fisher.batches(data),
        fisher.likelihood(range(10)),
        fisher_type=fisher.fisher_type,
    )
    return torch.cat([one.flatten() for one in found.values()])


def traces(learner: Learner, task: Task) -> dict[str, float]:
    """The trace of every Fisher, and how well the model does."""
    fishers = {name: Fisher(name) for name in ("empirical", "exact", "mc")}
    fishers |= {f"batch {size}": Fisher(batch=size) for size in BATCHES}
    diagonals = {name: fisher_of(learner.model, task.train, one) for name, one in fishers.items()}
    with torch.no_grad():
        loss = F.cross_entropy(learner.model(task.train.x), task.train.y)
    pair = torch.stack([diagonals["empirical"], diagonals["exact"]])
    return {
        **{name: float(f"{float(one.sum()):.4g}") for name, one in diagonals.items()},
        "correlation": round(float(torch.corrcoef(pair)[0, 1]), 4),
        "loss": round(float(loss), 5),
        "train": round(learner.accuracy(task.train, range(10)), 4),
        "test": round(learner.accuracy(task.test, range(10)), 4),
    }


# Half precision -------------------------------------------------------------------------------


def halves(model: nn.Module, data: Part, batch: int = 64) -> dict[str, float]:
    """What is left of the trace, and of the entries, when gradients are squared in half precision.

    Squares are summed in float32, so that nothing is lost but in squaring; `batch`: those of the
    mean gradient of batches, which is smaller than a sample's.
    """
    parameters = {name: one.detach() for name, one in model.named_parameters()}

    def nll(parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, dict(parameters), (x[None],)), y[None])

    gradients = vmap(grad(nll), in_dims=(None, 0, 0))(parameters, data.x, data.y)
    single = torch.cat([one.flatten(1) for one in gradients.values()], 1)
    means = single.unflatten(0, (-1, batch)).mean(1)
    found = {}
    for name, each in (("sample", single), (f"batch of {batch}", means)):
        exact = each.square().mean(0)
        for dtype in HALVES:
            rounded = each.to(dtype).square().float().mean(0)
            kind = f"{name}, {str(dtype).removeprefix('torch.')}"
            found[f"{kind}: zero"] = float(((rounded == 0) & (exact > 0)).sum() / (exact > 0).sum())
            found[f"{kind}: trace"] = float(rounded.sum() / exact.sum())
    return {name: round(value, 5) for name, value in found.items()}


# Linear regression ----------------------------------------------------------------------------


def diabetes() -> list[tuple[Tensor, Tensor]]:
    """scikit-learn's 442 patients, women and then men: eight inputs and 1; disease after a year.

    Sex is not an input, nor is one of two blood values that nearly determine each other.
    """
    data = load_diabetes()
    x, y = (torch.tensor(one, dtype=torch.float64) for one in (data.data, data.target))
    first = x[:, 1] < 0
    x = x[:, [0, 2, 3, 4, 6, 7, 8, 9]]
    x = torch.cat([x / x.std(0), torch.ones(len(x), 1)], 1)
    y = (y - y.mean()) / y.std()
    return [(x[chosen], y[chosen]) for chosen in (first, ~first)]


def regression() -> dict[str, Any]:
    """The mean squared error on both tasks together, of every penalty's own minimum.

    The second task's minimum is searched in closed form, so nothing is left to an optimizer:
    (A2 + k P) theta = b2 + k P theta1, for A = X^T X, b = X^T y and the penalty's matrix P.
    """
    (x1, y1), (x2, y2) = diabetes()
    theta1 = torch.linalg.lstsq(x1, y1).solution
    model = nn.Linear(x1.shape[1], 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(theta1)
    fisher = diagonal_fisher(
        model, [(x1, y1[:, None])], Regression(), fisher_type="exact", reduction="sum"
    )
    full = x1.T @ x1
    diagonal = torch.diag(fisher["weight"][0])
    assert torch.allclose(diagonal.diagonal(), full.diagonal(), rtol=1e-5)
    axes = torch.linalg.eigh(full).eigenvectors
    both = torch.cat([x1, x2]), torch.cat([y1, y2])

    def error(theta: Tensor) -> list[float]:
        data = (*((x1, y1), (x2, y2)), both)
        return [round(float((x @ theta - y).square().mean()), 5) for x, y in data]

    def minimum(matrix: Tensor) -> Tensor:
        return torch.linalg.solve(x2.T @ x2 + matrix, x2.T @ y2 + matrix @ theta1)

    def best(matrix: Tensor) -> Tensor:
        scales = torch.logspace(-4, 4, 161, dtype=torch.float64)
        return min((minimum(k * matrix) for k in scales), key=lambda one: error(one)[2])

    def turned() -> Tensor:
        """The diagonal Fisher of the same inputs, along their principal axes."""
        return axes @ torch.diag((axes.T @ full @ axes).diagonal()) @ axes.T

    zero, identity = torch.zeros_like(full), torch.eye(len(full), dtype=full.dtype)
    return {
        "joint training": error(torch.linalg.lstsq(*both).solution),
        "full Fisher, strength 1": error(minimum(full)),
        "diagonal Fisher, strength 1": error(minimum(diagonal)),
        "diagonal Fisher, best strength": error(best(diagonal)),
        "L2, best strength": error(best(identity)),
        "diagonal Fisher along the principal axes, strength 1": error(minimum(turned())),
        "first task only": error(theta1),
        "second task only (fine-tuning)": error(minimum(zero)),
    }


# Runs and tables --------------------------------------------------------------------------------


def run(store: Store, quick: bool) -> None:
    """All runs; the quick form has two seeds and stops early."""
    for seed in SEEDS[:2] if quick else SEEDS:
        if store.select(what="time", step=TIMES[-1], seed=seed):
            continue
        (task,) = permuted(1, seed, samples=SAMPLES, scored=2_000)
        few = Part(*(one[:256] for one in task.train))
        learner = Learner(seed, 0)
        done = 0
        for step in TIMES[:2] if quick else TIMES:
            learner.steps, done = step - done, step
            learner.learn(task)
            key = {"step": step, "seed": seed}
            store.run(partial(halves, learner.model, few), what="halves", **key)
            store.run(partial(traces, learner, task), what="time", **key)
    store.run(regression, what="regression")


def tables(store: Store) -> dict[str, str]:
    """By name."""
    return {
        "batch": _batches(store),
        "time": _over_time(store),
        "halves": _halves(store),
        "regression": _regression(store),
    }


def _steps(store: Store) -> list[int]:
    return sorted({one["step"] for one in store.select(what="time")})


def _batches(store: Store) -> str:
    steps = _steps(store)
    rows = []
    for size in BATCHES:
        cells = []
        for step in steps:
            runs = store.select(what="time", step=step)
            ratios = [size * one[f"batch {size}"] / one["empirical"] for one in runs]
            cells.append(estimate(ratios).text(1, 2))
        rows.append([_squared(size), *cells])
    return table(["squared", *(f"{step:,} steps" for step in steps)], rows)


def _squared(size: int) -> str:
    return "samples" if size == 1 else f"means of {size}"


def _over_time(store: Store) -> str:
    head = ["steps", "training accuracy", "test accuracy", "loss"]
    head += ["empirical", "exact", "sampled", "empirical / exact", "correlation"]
    rows = []
    for step in _steps(store):
        runs = store.select(what="time", step=step)
        accuracies = [[one[part] for one in runs] for part in ("train", "test")]
        columns = [[one[name] for one in runs] for name in ("loss", "empirical", "exact", "mc")]
        ratios = [one["empirical"] / one["exact"] for one in runs]
        likeness = [one["correlation"] for one in runs]
        cells = [estimate(each).text(digits=1) for each in accuracies]
        cells += [_rounded(each) for each in (*columns, ratios)]
        rows.append([f"{step:,}", *cells, estimate(likeness).text(1, 2)])
    return table(head, rows)


def _rounded(values: Sequence[float]) -> str:
    """The mean and half its interval, to the first digit of the interval."""
    found = estimate(values)
    return found.text(1, max(0, -math.floor(math.log10(found.half))))


def _halves(store: Store) -> str:
    head = ["squared", "in", "percent of"]
    head += [f"{step:,} steps" for step in _steps(store)]
    rows = []
    for name in ("sample", "batch of 64"):
        for dtype in HALVES:
            short = str(dtype).removeprefix("torch.")
            for what, of in (("zero", "entries that become 0"), ("trace", "trace that is left")):
                cells = []
                for step in _steps(store):
                    runs = store.select(what="halves", step=step)
                    values = [one[f"{name}, {short}: {what}"] for one in runs]
                    cells.append(estimate(values).text(digits=1))
                rows.append([f"gradient of a {name}", short, of, *cells])
    return table(head, rows)


def _regression(store: Store) -> str:
    (found,) = store.select(what="regression")
    head = ["after the second task", "first task", "second task", "both"]
    names = [name for name, one in found.items() if isinstance(one, list)]
    return table(head, ([name, *(f"{one:.4f}" for one in found[name])] for name in names))


def draw(store: Store) -> None:
    """The traces over training time."""
    from _plot import BLUE, GREEN, ORANGE, VERMILION, new_figure, save

    steps = _steps(store)
    places = range(len(steps))  # the first is 0 steps, which no logarithm has
    figure = new_figure(7.5, 4.2)
    axis = figure.subplots()
    names = {"exact": BLUE, "empirical": VERMILION, "mc": GREEN, "batch 64": ORANGE}
    labels = {"mc": "sampled", "batch 64": "squares of means of 64"}
    for name, colour in names.items():
        logs = [
            estimate([math.log10(one[name]) for one in store.select(what="time", step=step)])
            for step in steps
        ]
        axis.plot(places, [10**one.mean for one in logs], "o-", color=colour, label=name)
        low, high = ([10 ** (one.mean + sign * one.half) for one in logs] for sign in (-1, 1))
        axis.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.lines[-1].set_label(labels.get(name, name))
    axis.set(yscale="log", xlabel="steps of training", ylabel="trace of the Fisher")
    axis.set_xticks(places, [f"{step:,}" for step in steps])
    axis.legend(frameon=False)
    save(figure, IMAGES / "results_fisher_facts.png")


STUDY = Study("fisher_facts", run, tables, draw)


if __name__ == "__main__":
    STUDY.main()
