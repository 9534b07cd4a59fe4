"""Masks of the most important weights: frozen for the next task, or kept in pruning.

A network learns digits with their pixels in one order, then in a second and a third. After each
task, the weights with the largest Fisher information are frozen, by masking gradients. EWC uses
the same Fisher information in a penalty. For pruning, the Fisher information times the squared
weight orders the weights by importance.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ewc import EWC, Classification, diagonal_fisher

# Colours that can be told apart with any colour vision.
BLUE, GREEN, GREY, ORANGE, PALE = "#0072B2", "#009E73", "#595959", "#E69F00", "#dddddd"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})

TASKS = 3
SEEDS = 5
STEPS = 200  # per task
FROZEN = (0.2, 0.35, 0.5, 0.65, 0.8)  # of the weights
PRUNED = (0.5, 0.7, 0.8, 0.9)  # of the weights
COLOURS = {"Fisher": BLUE, "magnitude": GREEN, "random": ORANGE}

Task = tuple[Tensor, Tensor, Tensor, Tensor]  # x [samples, 64], y, and those held out
Weights = dict[str, Tensor]
Results = dict[tuple[str, float], Tensor]  # accuracy, by method and share of the weights


def largest(importance: Weights, share: float) -> Weights:
    """Masks of the largest entries: a share of all entries."""
    threshold = torch.cat([one.flatten() for one in importance.values()]).quantile(1 - share)
    return {name: one > threshold for name, one in importance.items()}


def importance(model: nn.Module, by: str, fisher: Weights) -> Weights:
    """How important each weight is."""
    if by == "Fisher":
        return fisher
    if by == "magnitude":
        return {name: one.detach().abs() for name, one in model.named_parameters()}
    fixed = torch.Generator().manual_seed(0)  # the same weights after every task
    return {name: torch.rand(one.shape, generator=fixed) for name, one in fisher.items()}


def train(
    model: nn.Module, task: Task, steps: int, regularizer: EWC | None, frozen: Weights
) -> None:
    """Minimise the cross-entropy, and the penalty if there is one; frozen weights stay."""
    x, y = task[:2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(len(x), (32,))
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        if regularizer is not None:
            loss = loss + regularizer()
        optimizer.zero_grad()
        loss.backward()
        for name, mask in frozen.items():
            model.get_parameter(name).grad[mask] = 0
        optimizer.step()


def learn(tasks: list[Task], method: str, share: float = 0.0, steps: int = STEPS) -> Tensor:
    """Learn the tasks one after the other.

    Args:
        tasks: What is learned.
        method: "none", "EWC", or the criterion for freezing weights.
        share: Of the weights, frozen from the second task on.
        steps: Per task.

    Returns:
        Test accuracy on each task after the last: [tasks].
    """
    model, frozen = network(), {}
    regularizer = EWC(model, Classification())
    for task in tasks:
        train(model, task, steps, regularizer if method == "EWC" else None, frozen)
        regularizer.consolidate([task[:2]])
        if method in COLOURS:
            frozen = largest(importance(model, method, regularizer.fisher), share)
    return torch.stack([test(model, task) for task in tasks])


def prune(task: Task, steps: int = STEPS) -> dict[tuple[str, float], Tensor]:
    """Test accuracy by the criterion for pruning, and by the share of pruned weights."""
    model = network()
    train(model, task, steps, None, {})
    whole = copy.deepcopy(model.state_dict())
    fisher = diagonal_fisher(model, [task[:2]], Classification())
    damage = {name: one * whole[name] ** 2 for name, one in fisher.items()}
    results = {}
    for by in COLOURS:
        order = importance(model, by, damage)
        for share in PRUNED:
            kept = largest(order, 1 - share)
            model.load_state_dict({name: one * kept[name] for name, one in whole.items()})
            results[by, share] = test(model, task)
        model.load_state_dict(whole)
    return results


def network() -> nn.Module:
    """From images, [N, 64], to logits, [N, 10]."""
    return nn.Sequential(
        nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )


@torch.no_grad()
def test(model: nn.Module, task: Task) -> Tensor:
    """The share of test images that are right."""
    return (model(task[2]).argmax(1) == task[3]).float().mean()


def permuted_digits(n: int = TASKS) -> list[Task]:
    """Scikit-learn's digits with their pixels in random orders, a quarter of them held out."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    held_out, rest = torch.randperm(len(x)).split([450, len(x) - 450])
    orders = [torch.randperm(64) for _ in range(n)]
    return [(x[rest][:, o], y[rest], x[held_out][:, o], y[held_out]) for o in orders]


def compare(seed: int, steps: int = STEPS) -> tuple[Results, Results]:
    """Average accuracy after the last task with each method; accuracy after pruning."""
    learned = {}
    masks = [(by, share) for by in COLOURS for share in FROZEN]
    for method, share in [("none", 0.0), ("EWC", 0.0), *masks]:
        torch.manual_seed(seed)
        learned[method, share] = learn(permuted_digits(), method, share, steps).mean()
    torch.manual_seed(seed)
    return learned, prune(permuted_digits()[0], steps)


def summarised(accuracies: Tensor) -> tuple[float, float]:
    """Mean over seeds, and its standard error, in percent."""
    return float(100 * accuracies.mean()), float(100 * accuracies.std() / len(accuracies) ** 0.5)


def draw(learned: Results, pruned: Results, path: Path) -> None:
    """Accuracy against the share of frozen weights, and of pruned ones."""
    figure = plt.figure(figsize=(9.5, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = "three tasks: frozen weights", "one task: pruned weights"
    for axis, title, results, shares in zip(
        axes, titles, (learned, pruned), (FROZEN, PRUNED), strict=True
    ):
        for by, colour in COLOURS.items():
            means, errors = zip(*(summarised(results[by, s]) for s in shares), strict=True)
            percent = [100 * share for share in shares]
            axis.errorbar(percent, means, errors, fmt="o-", color=colour, capsize=3, label=by)
        axis.set(xlabel="share of the weights (%)", ylim=(0, 100))
        axis.set_title(title, loc="left", weight="bold")
        axis.grid(axis="y", color=PALE, linewidth=0.8)
    for method, style in (("EWC", "--"), ("none", ":")):
        axes[0].axhline(summarised(learned[method, 0.0])[0], color=GREY, ls=style, label=method)
    axes[0].set_ylabel("test accuracy (%)")
    axes[0].legend(frameon=False, loc="lower center", ncols=2)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def table(results: Results, shares: tuple[float, ...]) -> str:
    """A row for each way to choose weights, a column for each share."""
    lines = [" " * 12 + "".join(f"{f'{100 * share:.0f} %':>14}" for share in shares)]
    for by in COLOURS:
        cells = ("{:.1f} +- {:.1f}".format(*summarised(results[by, share])) for share in shares)
        lines.append(f"  {by:10}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Compare, print, draw, and check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("masks.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for products this small
    runs = [compare(options.seed + i) for i in range(SEEDS)]
    learned, pruned = (
        {key: torch.stack([one[key] for one in each]) for key in each[0]}
        for each in zip(*runs, strict=True)
    )
    print(f"Test accuracy in percent (mean +- standard error, {SEEDS} seeds)")
    print(f"Average of {TASKS} tasks after the last")
    for method in ("none", "EWC"):
        print("  {:10}{:8.1f} +- {:.1f}".format(method, *summarised(learned[method, 0.0])))
    print("The same, with a share of the weights frozen")
    print(table(learned, FROZEN))
    print("One task, with a share of the weights set to 0")
    print(table(pruned, PRUNED))
    draw(learned, pruned, options.out)
    print(f"Picture: {options.out}")
    check(learned, pruned)


def check(learned: Results, pruned: Results) -> None:
    """What this example claims: masks come close to EWC, and do not gain in pruning."""
    plain, protected = (summarised(learned[method, 0.0])[0] for method in ("none", "EWC"))
    best = {by: max(summarised(learned[by, s])[0] for s in FROZEN) for by in COLOURS}
    assert best["Fisher"] > plain + 20, f"{best} against {plain:.1f} without"
    assert best["Fisher"] > best["random"] + 10, best
    assert best["Fisher"] < protected + 2, f"{best} against {protected:.1f} with EWC"
    fisher, magnitude = (summarised(pruned[by, PRUNED[-1]])[0] for by in ("Fisher", "magnitude"))
    assert fisher < magnitude + 2, f"pruned by the Fisher {fisher:.1f}, {magnitude:.1f}"


if __name__ == "__main__":
    main()
