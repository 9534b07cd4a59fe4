"""A hypernetwork: EWC protects parameters that compute the weights of another network.

The hypernetwork computes all the weights of a main network from an embedding of the task; the main
network has no parameters itself. Each task is the handwritten digits with their pixels in another
order. A task is forgotten if its embedding leads to other weights. EWC protects the hypernetwork.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from ewc import EWC, Classification

# Colours that can be told apart with any colour vision.
BLUE, VERMILION = "#0072B2", "#D55E00"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})

TASKS = 3
SEEDS = 3
STEPS = 200  # per task
EVERY = 20  # steps from one test to the next


class Task(NamedTuple):
    """The digits with their pixels in some order."""

    x: Tensor  # [samples, 64]
    y: Tensor
    x_test: Tensor
    y_test: Tensor


class Hypernetwork(nn.Module):
    """From the number of a task to the weights of `main`, by name."""

    def __init__(self, main: nn.Module, tasks: int = TASKS, size: int = 16) -> None:
        super().__init__()
        self.shapes = {name: one.shape for name, one in main.named_parameters()}
        self.embeddings = nn.Embedding(tasks, size)
        self.hidden = nn.Linear(size, 32)
        self.out = nn.Linear(32, sum(shape.numel() for shape in self.shapes.values()))
        nn.init.normal_(self.out.weight, std=0.02)
        with torch.no_grad():  # at first, the main network's usual initialisation plus noise
            self.out.bias.copy_(torch.cat([one.flatten() for one in main.parameters()]))

    def forward(self, task: int) -> dict[str, Tensor]:
        """The weights for a task."""
        embedding = self.embeddings(torch.tensor(task))
        flat = self.out(torch.tanh(self.hidden(embedding)))
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


def run(main: nn.Module, task: int, model: nn.Module, batch: Any) -> Tensor:
    """The main network's outputs for a batch, with the weights that `model` computes for `task`."""
    return functional_call(main, model(task), (batch[0],))


def learn(tasks: list[Task], strength: float | Literal["auto"], steps: int = STEPS) -> Tensor:
    """Learn the tasks one after the other.

    Returns:
        Test accuracy on each task, every `EVERY` steps: [tests, tasks].
    """
    main = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model = Hypernetwork(main, len(tasks))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    regularizer = EWC(model, Classification(), strength=strength)
    curve = [[test(main, model, *one) for one in enumerate(tasks)]]
    for t, task in enumerate(tasks):
        forward = partial(run, main, t)
        for step in range(1, steps + 1):
            chosen = torch.randint(len(task.x), (32,))
            batch = task.x[chosen], task.y[chosen]
            loss = F.cross_entropy(forward(model, batch), batch[1]) + regularizer()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % EVERY == 0:
                curve.append([test(main, model, *one) for one in enumerate(tasks)])
        regularizer.consolidate([(task.x, task.y)], forward=forward)
    return torch.tensor(curve)


@torch.no_grad()
def test(main: nn.Module, model: nn.Module, t: int, task: Task) -> float:
    """The share of test images of task `t` that are right."""
    guesses = run(main, t, model, (task.x_test,)).argmax(1)
    return float((guesses == task.y_test).float().mean())


def permuted_digits() -> Task:
    """Scikit-learn's digits with the pixels in a random order, a fifth of them held out."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    x, order = x[:, torch.randperm(64)], torch.randperm(len(x))
    return Task(x[order[360:]], y[order[360:]], x[order[:360]], y[order[:360]])


def compare(seed: int, steps: int = STEPS) -> dict[str, Tensor]:
    """With and without EWC, from the same data and the same beginning."""
    results = {}
    for method, strength in (("fine-tuning", 0.0), ("EWC", "auto")):
        torch.manual_seed(seed)
        tasks = [permuted_digits() for _ in range(TASKS)]
        results[method] = learn(tasks, strength, steps)
    return results


def check(results: dict[str, Tensor]) -> None:
    """What this example claims: the tasks before the last are forgotten less."""
    plain, ours = (float(results[m][-1, :-1].mean()) for m in ("fine-tuning", "EWC"))
    assert ours > plain + 0.05, f"EWC keeps {ours:.3f}, fine-tuning {plain:.3f}"


def draw(results: dict[str, Tensor], steps: int, path: Path) -> None:
    """A panel for each task, accuracy against training steps."""
    tasks = results["EWC"].shape[1]
    figure = plt.figure(figsize=(9, 1.5 * tasks + 0.6), layout="constrained")
    axes = figure.subplots(tasks, 1, sharex=True, sharey=True)
    for t, axis in enumerate(axes):
        axis.axvspan(t * steps, (t + 1) * steps, color="#efefef", lw=0)
        for method, curve in results.items():
            x = EVERY * torch.arange(len(curve))
            colour, style = (BLUE, "-") if method == "EWC" else (VERMILION, "--")
            begun = x >= t * steps
            y = 100 * curve[begun, t]
            axis.plot(x[begun], y, style, color=colour, linewidth=2, label=method)
        axis.set(xlim=(0, tasks * steps), ylim=(0, 104), yticks=(0, 50, 100))
        axis.set_ylabel(f"task {t + 1}", weight="bold")
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes[0].set_title("Test accuracy (%), from when a task is learned", loc="left", weight="bold")
    axes[0].legend(loc="lower right", frameon=False)
    middles = [(t + 0.5) * steps for t in range(tasks)]
    axes[-1].set_xticks(middles, [f"learning task {t + 1}" for t in range(tasks)])
    axes[-1].tick_params(axis="x", length=0)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Compare, print, draw, and check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("hypernetwork.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for products this small
    runs = [compare(options.seed + i) for i in range(SEEDS)]
    results = {method: torch.stack([run[method] for run in runs]).mean(0) for method in runs[0]}
    print(f"Test accuracy after the last task, in percent (mean of {SEEDS} seeds)")
    print(" " * 12 + "".join(f"{f'task {t + 1}':>8}" for t in range(TASKS)) + " average")
    for method, curve in results.items():
        numbers = [*curve[-1].tolist(), float(curve[-1].mean())]
        print(f"{method:12}" + "".join(f"{100 * number:8.1f}" for number in numbers))
    draw(results, STEPS, options.out)
    print(f"Picture: {options.out}")
    check(results)


if __name__ == "__main__":
    main()
