"""Merging two models that were fine-tuned from one start: by the Fisher, or by the plain mean.

Fisher merging (Matena & Raffel, 2022) weights every entry of the two models by its Fisher
information. The result minimises the sum of the two models' EWC penalties, so it is also the
anchor of an `EWC` object that has consolidated both.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ewc import EWC, Classification, diagonal_fisher

# Colours that can be told apart with any colour vision.
BLUE, GREY, ORANGE, PALE = "#0072B2", "#595959", "#E69F00", "#dddddd"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})

SEEDS = 10
STEPS = 300
SHARES = [step / 10 for step in range(11)]  # of the first model
COLOURS = {"plain mean": ORANGE, "Fisher merging": BLUE}

Weights = dict[str, Tensor]


class Data(NamedTuple):
    """Images, `x` [samples, 64], and the digits that they show."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def merged(a: Weights, b: Weights, fisher_a: Weights, fisher_b: Weights, share: float) -> Weights:
    """Sum of `F * theta` over sum of `F`, the first model weighed by `share`."""
    result = {}
    for name, mean in mixed(a, b, share).items():
        f_a, f_b = share * fisher_a[name], (1 - share) * fisher_b[name]
        found = (f_a * a[name] + f_b * b[name]) / (f_a + f_b)
        result[name] = torch.where(f_a + f_b > 0, found, mean)  # the mean if both are 0
    return result


def mixed(a: Weights, b: Weights, share: float) -> Weights:
    """The plain mean of two models, the first weighed by `share`."""
    return {name: share * a[name] + (1 - share) * b[name] for name in a}


def anchor(model: nn.Module, a: Weights, b: Weights, data: tuple[Data, Data]) -> Weights:
    """The same as `merged` with equal shares, by `EWC`."""
    regularizer = EWC(model, Classification(), fisher_type="exact")
    for weights, one in zip((a, b), data, strict=True):
        model.load_state_dict(weights)
        regularizer.consolidate([(one.x, one.y)])
    return regularizer.anchor


def train(model: nn.Module, data: list[Data], lr: float, steps: int) -> nn.Module:
    """Minimise the cross-entropy over all of the data."""
    x, y = torch.cat([one.x for one in data]), torch.cat([one.y for one in data])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(len(x), (32,))
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def test(model: nn.Module, points: list[Weights], data: tuple[Data, Data]) -> Tensor:
    """The average over both sets of the share of held-out images that are right: [points]."""
    found = []
    for weights in points:
        model.load_state_dict(weights)
        right = [(model(one.x_test).argmax(1) == one.y_test).float().mean() for one in data]
        found.append(torch.stack(right).mean())
    return torch.stack(found)


def turned(digits: Data) -> tuple[Data, Data]:
    """All digits upright, and turned by 90 degrees."""
    x, x_test = (
        one.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1) for one in (digits.x, digits.x_test)
    )
    return digits, Data(x, digits.y, x_test, digits.y_test)


def classes(digits: Data) -> tuple[Data, Data]:
    """The digits 0 to 4, and 5 to 9."""
    small, small_test = digits.y < 5, digits.y_test < 5
    first, second = (
        Data(digits.x[of], digits.y[of], digits.x_test[of_test], digits.y_test[of_test])
        for of, of_test in ((small, small_test), (~small, ~small_test))
    )
    return first, second


def covered(digits: Data) -> tuple[Data, Data]:
    """All digits, but only the upper half of each image, and only the lower half."""
    upper = torch.arange(64) < 32
    first, second = (
        digits._replace(x=digits.x * seen, x_test=digits.x_test * seen) for seen in (upper, ~upper)
    )
    return first, second


def compare(
    make: Callable[[Data], tuple[Data, Data]], seed: int, steps: int = STEPS
) -> dict[str, Tensor]:
    """Average accuracy on both sets: of joint training [1], of the ways to merge [shares]."""
    torch.manual_seed(seed)
    loaded = load_digits()
    x, y = torch.tensor(loaded.data, dtype=torch.float32) / 16, torch.tensor(loaded.target)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    start = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    train(start, [Data(x[:300], y[:300], x, y)], 0.05, steps)
    data = make(Data(x[750:], y[750:], x[300:750], y[300:750]))
    models = [train(copy.deepcopy(start), [one], 0.02, steps) for one in data]
    fishers = [
        diagonal_fisher(model, [(one.x, one.y)], Classification(), fisher_type="exact")
        for model, one in zip(models, data, strict=True)
    ]
    a, b = (copy.deepcopy(model.state_dict()) for model in models)
    for name, one in anchor(start, a, b, data).items():
        seen = fishers[0][name] + fishers[1][name] > 0
        ours = merged(a, b, *fishers, share=0.5)[name]
        torch.testing.assert_close(one[seen], ours[seen])
    joint = train(copy.deepcopy(start), list(data), 0.02, steps).state_dict()
    return {
        "joint training": test(start, [joint], data),
        "plain mean": test(start, [mixed(a, b, share) for share in SHARES], data),
        "Fisher merging": test(start, [merged(a, b, *fishers, share) for share in SHARES], data),
    }


def summarised(accuracies: Tensor) -> tuple[float, float]:
    """Mean over seeds, and its standard error, in percent."""
    return float(100 * accuracies.mean()), float(100 * accuracies.std() / len(accuracies) ** 0.5)


def rows(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is compared: average accuracies, [seeds]."""
    table = {
        "first model": results["plain mean"][:, -1],
        "second model": results["plain mean"][:, 0],
        "joint training": results["joint training"][:, 0],
    }
    for method in COLOURS:
        best = results[method].mean(0).argmax()
        table[f"{method}, equal shares"] = results[method][:, len(SHARES) // 2]
        table[f"{method}, best share"] = results[method][:, best]
    return table


def draw(runs: dict[str, dict[str, Tensor]], path: Path) -> None:
    """A panel for each pair of data sets: accuracy against the share of the first model."""
    figure = plt.figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, len(runs), sharey=True)
    for axis, (name, results) in zip(axes, runs.items(), strict=True):
        joint = summarised(results["joint training"][:, 0])[0]
        axis.axhline(joint, color=GREY, linestyle="--", label="joint training")
        for method, colour in COLOURS.items():
            means, errors = zip(*map(summarised, results[method].T), strict=True)
            axis.errorbar(SHARES, means, errors, color=colour, linewidth=2, label=method)
        axis.set(xlabel="share of the first model", ylim=(45, 100))
        axis.set_title(name, loc="left", weight="bold")
        axis.grid(axis="y", color=PALE, linewidth=0.8)
    axes[0].set_ylabel("accuracy (%), average\nof both data sets")
    axes[1].legend(frameon=False, loc="lower center")
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Compare, print, draw, and check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("merging.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for products this small
    runs = {}
    for make in (turned, classes, covered):
        found = [compare(make, options.seed + i) for i in range(SEEDS)]
        results = {key: torch.stack([one[key] for one in found]) for key in found[0]}
        runs[make.__name__] = results
    print(
        f"Accuracy, average of both data sets, in percent (mean +- standard error, {SEEDS} seeds)"
    )
    print(" " * 29 + "".join(f"{name:>13}" for name in runs))
    tables = [rows(results) for results in runs.values()]
    for row in tables[0]:
        cells = ("{:.1f} +- {:.1f}".format(*summarised(table[row])) for table in tables)
        print(f"{row:29}" + "".join(f"{cell:>13}" for cell in cells))
    draw(runs, options.out)
    print(f"Picture: {options.out}")
    check(dict(zip(runs, tables, strict=True)))


def check(tables: dict[str, dict[str, Tensor]]) -> None:
    """What this example claims: Fisher merging is better on halves of images only."""
    for name, table in tables.items():
        gain = table["Fisher merging, best share"] - table["plain mean, best share"]
        mean, error = summarised(gain)
        if name == "covered":
            assert mean > 8, f"{name}: the Fisher gains {mean:.1f} +- {error:.1f}"
        else:
            assert mean < 2, f"{name}: the Fisher gains {mean:.1f} +- {error:.1f}"


if __name__ == "__main__":
    main()
