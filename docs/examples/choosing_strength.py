"""Choosing `strength`: a sweep, the value of Laplace's approximation, and the bound of stability.

A network learns handwritten digits, and then the same digits with their pixels in another order.
The second task is learned once for each strength, from the same network. If the penalty is too
weak, the first task is forgotten; if it is too strong, the second is not learned. Above a bound
that is known beforehand, gradient descent on the penalty diverges.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ewc import EWC, Classification

# Colours that can be told apart with any colour vision.
BLUE, GREY, ORANGE, VERMILION = "#0072B2", "#595959", "#E69F00", "#D55E00"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})

LR = 0.1
STEPS = 400
# In units of 1 / N, the value of Laplace's approximation for a mean loss.
SWEEP = [10 ** (half / 2) for half in range(-2, 10)]


class Task(NamedTuple):
    """The digits with their pixels in some order."""

    x: Tensor  # [samples, 64]
    y: Tensor
    x_test: Tensor
    y_test: Tensor


class Sweep(NamedTuple):
    """The results; accuracies are NaN if training diverged."""

    strengths: list[float]  # in units of 1 / N
    first: Tensor  # test accuracy on the first task, for each strength
    second: Tensor  # and on the second
    limit: float  # the strength from which on gradient descent diverges, in units of 1 / N
    largest: float  # entry of the Fisher of the first task
    samples: int  # N, of the second


def sweep(seed: int, strengths: list[float] = SWEEP, steps: int = STEPS) -> Sweep:
    """Learn the first task once, and the second one for each strength."""
    torch.manual_seed(seed)
    first, second = permuted_digits(), permuted_digits()
    n = len(second.x)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    regularizer = EWC(model, Classification(), reduction="sum", strength=1 / n)
    train(model, regularizer, first, steps)
    summary = regularizer.consolidate([(first.x, first.y)])

    accuracies = []
    for strength in strengths:
        torch.manual_seed(seed)
        # Copied together, so that the copy of the regularizer protects the copy of the model.
        again, its_regularizer = copy.deepcopy((model, regularizer))
        its_regularizer.strength = strength / n
        stable = train(again, its_regularizer, second, steps)
        pair = (accuracy(again, first), accuracy(again, second))
        accuracies.append(pair if stable else (torch.nan, torch.nan))
    on_first, on_second = torch.tensor(accuracies).T
    return Sweep(strengths, on_first, on_second, n * summary.bound / LR, summary.largest, n)


def train(model: nn.Module, regularizer: EWC, task: Task, steps: int) -> bool:
    """Plain gradient descent on the mean loss and the penalty; whether it has stayed finite."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(steps):
        chosen = torch.randint(len(task.x), (32,))
        loss = F.cross_entropy(model(task.x[chosen]), task.y[chosen]) + regularizer()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return bool(loss.isfinite())


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """The share of test images that are right."""
    return float((model(task.x_test).argmax(1) == task.y_test).float().mean())


def permuted_digits() -> Task:
    """Scikit-learn's digits with the pixels in a random order, a fifth of them held out."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    x, order = x[:, torch.randperm(64)], torch.randperm(len(x))
    return Task(x[order[360:]], y[order[360:]], x[order[:360]], y[order[:360]])


def check(found: Sweep) -> None:
    """What this example claims: a medium strength is best, and the bound is right."""
    strength = torch.tensor(found.strengths)
    stable = ~found.first.isnan()
    assert stable[strength < 0.5 * found.limit].all(), "diverged below the limit"
    assert not stable[strength > 2 * found.limit].any(), "stable above the limit"
    average = (found.first + found.second) / 2
    best, laplace = float(average[stable].max()), float(average[strength == 1])
    weakest = float(average[0])
    assert laplace > weakest - 0.03, f"{laplace:.2f} against {weakest:.2f} with hardly any penalty"
    assert best > weakest + 0.03, f"{best:.2f} against {weakest:.2f} with hardly any penalty"


def table(found: Sweep) -> str:
    """Accuracies against strength."""
    lines = [f"  strength     first task   second task   average   (N = {found.samples})"]
    for strength, *pair in zip(found.strengths, found.first, found.second, strict=True):
        if pair[0].isnan():
            numbers = "      diverged"
        else:
            percents = [100 * float(one) for one in (*pair, sum(pair) / 2)]
            numbers = "{:14.1f}{:14.1f}{:10.1f}".format(*percents)
        mark = "   Laplace" if strength == 1 else ""
        lines.append(f"{strength:8.3g} / N{numbers}{mark}")
    return "\n".join(lines)


def draw(found: Sweep, path: Path) -> None:
    """Both accuracies and their average against strength."""
    figure = plt.figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    average = (found.first + found.second) / 2
    for label, values, colour, style in (
        ("first task", found.first, BLUE, "o-"),
        ("second task", found.second, ORANGE, "s-"),
        ("average", average, "black", ":"),
    ):
        axis.plot(found.strengths, 100 * values, style, color=colour, linewidth=2, label=label)
    low = 100 * float(average[~average.isnan()].min()) - 15
    axis.axvline(1, color=GREY, linestyle="--")
    axis.text(1.1, low + 1, "Laplace: 1 / N", color=GREY)
    weakest, strongest = found.strengths[0], found.strengths[-1]
    axis.axvspan(found.limit, strongest, color=VERMILION, alpha=0.15, lw=0)
    axis.text(1.15 * found.limit, low + 1, "diverges", color=VERMILION, weight="bold")
    axis.set(xscale="log", xlim=(weakest / 1.2, strongest), ylim=(low, 101))
    axis.set(xlabel="strength (times N)", ylabel="test accuracy (%)")
    axis.set_title("After the second task", loc="left", weight="bold")
    axis.legend(loc="lower left", bbox_to_anchor=(0.35, 1), ncols=3, frameon=False)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Sweep, print, draw, and check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("choosing_strength.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for products this small
    found = sweep(options.seed)
    print(table(found))
    print(
        f"The largest entry of the Fisher is {found.largest:.3g}: stable while lr * strength * "
        f"largest < 2,\nthat is for strength < {found.limit:.0f} / N"
    )
    draw(found, options.out)
    print(f"Picture: {options.out}")
    check(found)


if __name__ == "__main__":
    main()
