"""Unlearning a digit by its Fisher information, compared with retraining without it.

Selective synaptic dampening (Foster et al., 2024): if the Fisher information of the digit to
forget is more than `alpha` times that of the retained data, the weight is multiplied by the
inverse of that ratio. No training is needed. In the first set each digit is a class; in the
second the classes are even and odd, so the forgotten digit shares its class with four others.
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

from ewc import Classification, diagonal_fisher

# Colours that can be told apart with any colour vision.
BLUE, PALE, VERMILION = "#0072B2", "#dddddd", "#D55E00"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})

RUNS = 20  # each with its own seed; every digit is forgotten in two of them
STEPS = 400
ALPHAS = (1, 2, 5, 10, 20, 50)
CLASSES = {"ten classes": 10, "even and odd": 2}
RETRAINED, ORIGINAL, SWITCHED_OFF = "retrained without it", "original", "output switched off"


def dampen(
    model: nn.Module, forgotten: dict[str, Tensor], retained: dict[str, Tensor], alpha: float
) -> nn.Module:
    """A copy of the model, its weights dampened by the two Fisher estimates."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            chosen = forgotten[name] > alpha * retained[name]
            weight[chosen] *= (retained[name] / forgotten[name])[chosen].clamp(max=1)
    return model


def train(x: Tensor, y: Tensor, classes: int, steps: int) -> nn.Module:
    """A network that classifies these images, [samples, 64]."""
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(steps):
        chosen = torch.randint(len(x), (32,))
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def forget(digit: int, classes: int, seed: int, steps: int = STEPS) -> dict[str, Tensor]:
    """Test accuracy by method on the forgotten digit, and on the others: [2]."""
    torch.manual_seed(seed)
    loaded = load_digits()
    x, digits = torch.tensor(loaded.data, dtype=torch.float32) / 16, torch.tensor(loaded.target)
    order = torch.randperm(len(x))
    x, is_digit, y = x[order], digits[order] == digit, digits[order] % classes
    test, rest = slice(0, 450), slice(450, None)

    def accuracy(model: nn.Module) -> Tensor:
        with torch.no_grad():
            right = (model(x[test]).argmax(1) == y[test]).float()
        return torch.stack([right[is_digit[test]].mean(), right[~is_digit[test]].mean()])

    gone = x[rest][is_digit[rest]], y[rest][is_digit[rest]]
    kept = x[rest][~is_digit[rest]], y[rest][~is_digit[rest]]
    model = train(x[rest], y[rest], classes, steps)
    results = {
        ORIGINAL: accuracy(model),
        RETRAINED: accuracy(train(*kept, classes, steps)),
    }
    if classes == 10:
        off = copy.deepcopy(model)
        off[-1].bias.data[digit] = -1e9
        results[SWITCHED_OFF] = accuracy(off)
    for fisher_type in ("exact", "empirical"):
        forgotten, retained = (
            diagonal_fisher(model, [data], Classification(), fisher_type=fisher_type)
            for data in (gone, kept)
        )
        for alpha in ALPHAS:
            name = f"{fisher_type}, alpha {alpha}"
            results[name] = accuracy(dampen(model, forgotten, retained, alpha))
    return results


def summarised(values: Tensor) -> str:
    """Mean over runs, and its standard error, in percent."""
    return f"{100 * values.mean():.1f} +- {100 * values.std() / len(values) ** 0.5:.1f}"


def draw(sets: dict[str, dict[str, Tensor]], path: Path) -> None:
    """A panel for each set of classes: accuracy of the forgotten digit and the others by alpha."""
    figure = plt.figure(figsize=(9.5, 4), layout="constrained")
    axes = figure.subplots(1, len(sets), sharey=True)
    for axis, (name, results) in zip(axes, sets.items(), strict=True):
        for which, (label, colour) in enumerate((("forgotten", VERMILION), ("others", BLUE))):
            for fisher_type, style in (("exact", "o-"), ("empirical", "s:")):
                found = [100 * results[f"{fisher_type}, alpha {a}"][:, which] for a in ALPHAS]
                means = [float(each.mean()) for each in found]
                errors = [float(each.std()) / len(each) ** 0.5 for each in found]
                text = f"{label}, {fisher_type} Fisher"
                axis.errorbar(ALPHAS, means, errors, fmt=style, color=colour, label=text)
            retrained = 100 * float(results[RETRAINED][:, which].mean())
            axis.axhline(retrained, color=colour, linestyle="--", label=f"{label}, retrained")
        axis.set(xscale="log", xlabel="alpha", ylim=(-4, 104))
        axis.set_xticks(ALPHAS, [str(alpha) for alpha in ALPHAS])
        axis.minorticks_off()
        axis.set_title(name, loc="left", weight="bold")
        axis.grid(axis="y", color=PALE, linewidth=0.8)
    axes[0].set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Compare, print, draw, and check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("unlearning.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for products this small
    sets = {}
    for name, classes in CLASSES.items():
        runs = [forget(run % 10, classes, options.seed + run) for run in range(RUNS)]
        sets[name] = {key: torch.stack([run[key] for run in runs]) for key in runs[0]}
    print(f"Test accuracy in percent (mean +- standard error, {RUNS} runs)")
    for name, results in sets.items():
        print(f"{name:22}{'forgotten':>14}{'others':>14}{'from retrained':>17}")
        for method, accuracy in results.items():
            distance = (accuracy[:, 0] - results[RETRAINED][:, 0]).abs()
            cells = (f"{summarised(one):>14}" for one in accuracy.T)
            print(f"  {method:20}" + "".join(cells) + f"{summarised(distance):>17}")
    draw(sets, options.out)
    print(f"Picture: {options.out}")
    check(sets)


def check(sets: dict[str, dict[str, Tensor]]) -> None:
    """What this example claims: a digit is forgotten only in part, and others are damaged."""
    for name, results in sets.items():
        before, goal = results[ORIGINAL].mean(0), results[RETRAINED].mean(0)
        found = results["exact, alpha 2"].mean(0)
        assert found[0] < before[0] - 0.1, f"{name}: {found} is hardly below {before}"
        for alpha in ALPHAS:
            forgotten, others = results[f"exact, alpha {alpha}"].mean(0)
            as_retrained = forgotten < goal[0] + 0.05 and others > goal[1] - 0.01
            assert not as_retrained, f"{name}: alpha {alpha} does as well as retraining"
    off, goal = (sets["ten classes"][method].mean(0) for method in (SWITCHED_OFF, RETRAINED))
    assert (off - goal).abs().max() < 0.03, f"{off} against {goal}"


if __name__ == "__main__":
    main()
