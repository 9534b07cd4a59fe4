"""EWC for LoRA: on the adapted weights, or on the adapter's matrices.

A network learns a first task. Then its weights are frozen, and small matrices beside them (LoRA,
Hu et al., 2021) learn two more. EWC of the adapter protects `up` and `down` themselves; EWC of the
weights is evaluated at `base + up @ down`, as in EWC-LoRA (arXiv 2602.17559), with the per-sample
Fisher of the weights.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from ewc import EWC, Classification, ZeroFisherWarning

# Colours that can be told apart with any colour vision.
BLUE, GREY, ORANGE, PALE = "#0072B2", "#595959", "#E69F00", "#dddddd"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})

RANK = 8
SEEDS = 5
STEPS = 200  # per task
FACTORS = (1.0, 3.0, 10.0)  # of the default strength
COLOURS = {"adapter": ORANGE, "weights": BLUE}

Results = dict[tuple[str, float], Tensor]  # accuracies, [seeds, tasks], by space and factor


class Task(NamedTuple):
    """Images of digits, and the outputs that tell them apart."""

    x: Tensor  # [samples, 64]
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    head: list[int]


class Adapted(nn.Module):
    """A frozen network, and two small trained matrices beside each of its weight matrices."""

    def __init__(self, base: nn.Module, rank: int = RANK) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.names = [name for name, one in base.named_parameters() if one.dim() == 2]
        shapes = [base.get_parameter(name).shape for name in self.names]
        self.down = nn.ParameterList(torch.randn(rank, n) / n**0.5 for _, n in shapes)
        self.up = nn.ParameterList(torch.zeros(n, rank) for n, _ in shapes)

    def weights(self) -> dict[str, Tensor]:
        """The weight matrices with the adapter, by their names in the network."""
        triples = zip(self.names, self.up, self.down, strict=True)
        return {name: self.base.get_parameter(name) + up @ down for name, up, down in triples}

    def forward(self, x: Tensor) -> Tensor:
        """The network's outputs with these weights."""
        return functional_call(self.base, self.weights(), x)


def train(
    model: nn.Module, task: Task, steps: int, penalty: Callable[[], Tensor | float] = float
) -> None:
    """Minimise the cross-entropy within the head and the penalty; `float()` is 0."""
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.003)
    for _ in range(steps):
        chosen = torch.randint(len(task.x), (32,))
        logits = model(task.x[chosen])[:, task.head]
        loss = F.cross_entropy(logits, task.y[chosen]) + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adapt(base: nn.Module, tasks: list[Task], space: str, factor: float, steps: int) -> Tensor:
    """Learn the tasks after the first with LoRA.

    Returns:
        Test accuracy on each task after the last: [tasks].
    """
    merged, model = copy.deepcopy(base), Adapted(copy.deepcopy(base))
    regularizer = EWC(merged if space == "weights" else model, Classification())

    def penalty() -> Tensor:
        return regularizer(at=model.weights()) if space == "weights" else regularizer()

    for t, task in enumerate(tasks):
        if t > 0:
            train(model, task, steps, penalty)
        merged.load_state_dict(model.weights(), strict=False)
        with warnings.catch_warnings():  # `up` is 0 at first, and so is the Fisher of `down`
            warnings.simplefilter("ignore", ZeroFisherWarning)
            likelihood = Classification(allowed_outputs=task.head)
            regularizer.consolidate([(task.x, task.y)], likelihood=likelihood)
        regularizer.strength = "auto"
        regularizer.strength *= factor
    return torch.tensor([test(model, task) for task in tasks])


@torch.no_grad()
def test(model: nn.Module, task: Task) -> float:
    """The share of test images that are right."""
    guesses = model(task.x_test)[:, task.head].argmax(1)
    return float((guesses == task.y_test).float().mean())


def turned() -> list[Task]:
    """All ten digits: upright, turned by 90 degrees, turned by 180."""
    return [digits(list(range(10)), turns) for turns in range(3)]


def split() -> list[Task]:
    """The digits 0 to 3, 4 to 6, 7 to 9, each group with its own outputs, with noise."""
    return [digits(head, noise=0.4) for head in ([0, 1, 2, 3], [4, 5, 6], [7, 8, 9])]


def digits(head: list[int], turns: int = 0, noise: float = 0.0) -> Task:
    """Scikit-learn's digits of these classes, a quarter of them held out."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    chosen = torch.isin(y, torch.tensor(head)).nonzero()[:, 0]
    chosen = chosen[torch.randperm(len(chosen))]
    x, y = x[chosen].rot90(turns, (1, 2)).flatten(1), y[chosen] - head[0]
    x, n = x + noise * torch.randn_like(x), len(x) // 4
    return Task(x[n:], y[n:], x[:n], y[:n], head)


def compare(make: Callable[[], list[Task]], seed: int, steps: int = STEPS) -> Results:
    """No EWC, and both spaces with every strength, from the same data and the same first task."""
    torch.manual_seed(seed)
    tasks = make()
    base = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    train(base, tasks[0], steps)
    results = {}
    for space, factor in [("none", 0.0), *((s, f) for s in COLOURS for f in FACTORS)]:
        torch.manual_seed(seed)
        results[space, factor] = adapt(base, tasks, space, factor, steps)[None]
    return results


def summarised(accuracies: Tensor) -> tuple[float, float]:
    """Mean over seeds of the average over tasks, and its standard error, in percent."""
    averages = 100 * accuracies.mean(1)
    return float(averages.mean()), float(averages.std() / len(averages) ** 0.5)


def gain(results: Results) -> tuple[float, float]:
    """The gain of EWC of the weights, both at their best strength; its standard error."""
    best = [max((results[s, f] for f in FACTORS), key=torch.mean) for s in ("weights", "adapter")]
    return summarised(best[0] - best[1])


def draw(runs: dict[str, Results], path: Path) -> None:
    """A panel for each set of tasks: average accuracy against strength."""
    figure = plt.figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, len(runs))
    for axis, (name, results) in zip(axes, runs.items(), strict=True):
        for space, colour in COLOURS.items():
            means, errors = zip(*(summarised(results[space, f]) for f in FACTORS), strict=True)
            label = f"EWC of the {space}"
            axis.errorbar(FACTORS, means, errors, fmt="o-", color=colour, capsize=3, label=label)
        plain = summarised(results["none", 0.0])[0]
        axis.axhline(plain, color=GREY, linestyle="--", label="LoRA without EWC")
        axis.set(xscale="log", xlabel="strength, times the default")
        axis.set_xticks(FACTORS, [f"{factor:g}" for factor in FACTORS])
        axis.minorticks_off()
        axis.set_title(name, loc="left", weight="bold")
        axis.grid(axis="y", color=PALE, linewidth=0.8)
    axes[0].set_ylabel("accuracy (%), average of three tasks")
    axes[1].legend(frameon=False, loc="center")
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Compare, print, draw, and check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("lora.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for products this small
    runs = {}
    for make in (turned, split):
        found = [compare(make, options.seed + i) for i in range(SEEDS)]
        results = {key: torch.cat([one[key] for one in found]) for key in found[0]}
        runs[f"{make.__name__} digits"] = results
    print(f"Test accuracy after the last task, in percent (mean of {SEEDS} seeds)")
    for name, results in runs.items():
        print(
            f"{name:16}{'strength':>9}"
            + "".join(f"{f'task {t}':>8}" for t in (1, 2, 3))
            + " average"
        )
        for (space, factor), accuracies in results.items():
            tasks = "".join(f"{100 * one:8.1f}" for one in accuracies.mean(0).tolist())
            average, error = summarised(accuracies)
            method = "LoRA alone" if space == "none" else f"EWC, {space}"
            print(f"  {method:14}{factor:9g}{tasks}{average:8.1f} +- {error:.1f}")
        print("  weights over adapter, each at its best: {:.1f} +- {:.1f}".format(*gain(results)))
    draw(runs, options.out)
    print(f"Picture: {options.out}")
    check(runs)


def check(runs: dict[str, Results]) -> None:
    """What this example claims: EWC of the weights is never worse, and better on one set."""
    gains = {name: gain(results)[0] for name, results in runs.items()}
    assert gains["turned digits"] > 3, gains
    assert gains["split digits"] > -1, gains
    for name, results in runs.items():
        plain, ours = (summarised(results[key])[0] for key in (("none", 0.0), ("weights", 3.0)))
        assert ours > plain + 5, f"{name}: {ours:.1f} against {plain:.1f} without EWC"


if __name__ == "__main__":
    main()
