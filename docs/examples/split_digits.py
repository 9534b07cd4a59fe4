"""A head per task: five pairs of handwritten digits, learned one after the other.

The network has ten outputs, and each task uses two of them: its head. The task of an image is
known, so only the outputs of its head are compared, in training, in testing and in the Fisher
information. Forgetting happens in the layers below the heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ewc import EWC, Classification

plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})

SEEDS = 3
EPOCHS = 10
NOISE = 0.4  # added to the pixels: without it, two digits are too easy to be forgotten


class Task(NamedTuple):
    """Images of two digits: `x` is [samples, 64], `y` the digits themselves."""

    head: list[int]  # the two outputs of this task, which are its digits
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def learn(tasks: list[Task], strength: float | Literal["auto"], epochs: int = EPOCHS) -> Tensor:
    """Learn the tasks one after the other.

    Returns:
        Test accuracy on each task (columns) after each task learned (rows): [tasks, tasks].
    """
    model = nn.Sequential(
        nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    regularizer = EWC(model, Classification(), strength=strength, fisher_type="exact")
    accuracy = torch.zeros(len(tasks), len(tasks))
    for t, task in enumerate(tasks):
        first = task.head[0]
        for _ in range(epochs):
            for x, y in batches(task):
                loss = F.cross_entropy(model(x)[:, task.head], y - first) + regularizer()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        head = Classification(allowed_outputs=task.head, target_transform=lambda y, f=first: y - f)
        regularizer.consolidate(batches(task), likelihood=head)
        accuracy[t] = torch.tensor([test(model, other) for other in tasks])
    return accuracy


def batches(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """The training data once, in random order, with noise that is new each time."""
    for chosen in torch.randperm(len(task.x)).split(32):
        x = task.x[chosen]
        yield x + NOISE * torch.randn_like(x), task.y[chosen]


@torch.no_grad()
def test(model: nn.Module, task: Task) -> float:
    """The share of test images that are right, among the outputs of the task's head."""
    guesses = model(task.x_test)[:, task.head].argmax(1)
    return float((guesses == task.y_test - task.head[0]).float().mean())


def split_digits() -> list[Task]:
    """Scikit-learn's digits, 0 and 1, 2 and 3, ..., a quarter of them held out."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    tasks = []
    for first in range(0, 10, 2):
        ours = (y // 2 == first // 2).nonzero()[:, 0]
        ours = ours[torch.randperm(len(ours))]
        held_out, rest = ours[: len(ours) // 4], ours[len(ours) // 4 :]
        x_test = x[held_out] + NOISE * torch.randn(len(held_out), 64)
        tasks.append(Task([first, first + 1], x[rest], y[rest], x_test, y[held_out]))
    return tasks


def compare(seed: int, epochs: int = EPOCHS) -> dict[str, Tensor]:
    """Accuracies with and without EWC, from the same data and the same beginning."""
    results = {}
    for method, strength in (("fine-tuning", 0.0), ("EWC", "auto")):
        torch.manual_seed(seed)
        results[method] = learn(split_digits(), strength, epochs)
    return results


def draw(results: dict[str, Tensor], path: Path) -> None:
    """A square of accuracies for each method: tasks learned so far by tasks tested."""
    figure = plt.figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True)
    for axis, (method, accuracy) in zip(axes, results.items(), strict=True):
        n = len(accuracy)
        learned = accuracy.tril() + torch.full((n, n), torch.nan).triu(1)
        axis.imshow(100 * learned.numpy(), cmap="Blues", vmin=50, vmax=115)
        for after in range(n):
            for task in range(after + 1):
                percent = 100 * float(accuracy[after, task])
                colour = "white" if percent > 88 else "black"
                axis.text(task, after, f"{percent:.0f}", ha="center", va="center", color=colour)
        average = 100 * float(accuracy[-1].mean())
        axis.set_title(f"{method}: {average:.0f} % on average", loc="left", weight="bold")
        names = [f"{2 * t}, {2 * t + 1}" for t in range(n)]
        axis.set_xticks(range(n), names)
        axis.set_yticks(range(n), names)
        axis.set_xlabel("test accuracy (%) on these digits")
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0].set_ylabel("after learning these")
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Compare, print, draw, and check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("split_digits.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for products this small
    runs = [compare(options.seed + i) for i in range(SEEDS)]
    results = {method: torch.stack([run[method] for run in runs]).mean(0) for method in runs[0]}
    print(f"Test accuracy after the last task, in percent (mean of {SEEDS} seeds)")
    print(" " * 12 + "".join(f"{f'{d}, {d + 1}':>8}" for d in range(0, 10, 2)) + " average")
    for method, accuracy in results.items():
        numbers = [*accuracy[-1].tolist(), float(accuracy[-1].mean())]
        print(f"{method:12}" + "".join(f"{100 * number:8.1f}" for number in numbers))
    draw(results, options.out)
    print(f"Picture: {options.out}")
    check(results)


def check(results: dict[str, Tensor]) -> None:
    """What this example claims: earlier tasks are forgotten less, and the last one is learned."""
    plain, ours = results["fine-tuning"][-1], results["EWC"][-1]
    gain = float((ours - plain)[:-1].mean())
    assert gain > 0.04, f"EWC gains only {gain:.3f} on the tasks before the last"
    assert ours[-1] > 0.75, f"EWC learns the last task to {ours[-1]:.3f} only"


if __name__ == "__main__":
    main()
