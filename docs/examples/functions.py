"""Regression on a curve in three pieces, with the uncertainty that the Fisher information gives.

A network learns a curve in three pieces of the x axis, one after the other. The Fisher
information of the pieces so far, summed over their samples, plus the precision of a prior, is the
precision of the weights in Laplace's approximation. It protects the learned pieces, and it gives
the uncertainty of the output: small on pieces with data, large elsewhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from ewc import OnlineEWC, Regression

# Colours that can be told apart with any colour vision.
BLUE, GREY, VERMILION = "#0072B2", "#595959", "#D55E00"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})

NOISE = 0.1  # standard deviation of the targets
SAMPLES = 200  # per piece
STEPS = 600  # per piece
PRIOR = 1.0
PIECES = ((-3.0, -1.0), (-1.0, 1.0), (1.0, 3.0))
GRID = torch.linspace(-3.3, 3.3, 133)[:, None]


class Bumps(nn.Module):
    """A sum of bumps, all of whose centres, widths and heights are learned."""

    def __init__(self, bumps: int = 30) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.linspace(-4.0, 4.0, bumps))
        self.log_widths = nn.Parameter(torch.full((bumps,), 0.5).log())
        self.heights = nn.Parameter(torch.zeros(bumps))

    def forward(self, x: Tensor) -> Tensor:
        """From `[N, 1]` to `[N, 1]`."""
        bumps = torch.exp(-0.5 * ((x - self.centres) / self.log_widths.exp()).square())
        return (bumps @ self.heights)[:, None]


def curve(x: Tensor) -> Tensor:
    """The curve to learn."""
    return torch.sin(2 * x) + 0.3 * x


class Belief(NamedTuple):
    """The output on the grid, and its standard deviation."""

    mean: Tensor  # [points]
    deviation: Tensor  # [points]


def learn(data: list[tuple[Tensor, Tensor]], strength: float, steps: int = STEPS) -> list[Belief]:
    """Learn the pieces one after the other; the output after each of them.

    With a mean loss, Laplace's approximation says `reduction="sum"` and `strength = 1 / N`.
    """
    model = Bumps()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    regularizer = OnlineEWC(
        model,
        Regression(variance=NOISE**2),
        strength=strength,
        fisher_type="exact",
        reduction="sum",
        prior_precision=PRIOR,
    )
    beliefs = []
    for x, y in data:
        for _ in range(steps):
            loss = F.mse_loss(model(x), y) / (2 * NOISE**2) + regularizer()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        regularizer.consolidate([(x, y)])
        beliefs.append(Belief(model(GRID).detach()[:, 0], deviation(model, regularizer)))
    return beliefs


def deviation(model: nn.Module, regularizer: OnlineEWC) -> Tensor:
    """The standard deviation of the output, from its gradients and that of the weights."""
    parameters = {name: one.detach() for name, one in model.named_parameters()}
    jacobian = jacrev(lambda values: functional_call(model, values, GRID)[:, 0])(parameters)
    return sum(
        (jacobian[name].square() / (fisher + PRIOR)).flatten(1).sum(1)
        for name, fisher in regularizer.fisher.items()
    ).sqrt()


def pieces() -> list[tuple[Tensor, Tensor]]:
    """Noisy points of the curve, `x` and `y` [samples, 1] for each piece."""
    data = []
    for low, high in PIECES:
        x = low + (high - low) * torch.rand(SAMPLES, 1)
        data.append((x, curve(x) + NOISE * torch.randn_like(x)))
    return data


def compare(seed: int, steps: int = STEPS) -> dict[str, list[Belief]]:
    """With and without EWC, from the same data."""
    results = {}
    for method, strength in (("fine-tuning", 0.0), ("OnlineEWC", 1 / SAMPLES)):
        torch.manual_seed(seed)
        results[method] = learn(pieces(), strength, steps)
    return results


def inside(piece: tuple[float, float]) -> Tensor:
    """Which points of the grid are in a piece: [points]."""
    return ((piece[0] <= GRID) & (piece[1] >= GRID))[:, 0]


def errors(belief: Belief) -> list[float]:
    """The root of the mean squared error on each piece, noise apart."""
    squared = (belief.mean - curve(GRID)[:, 0]).square()
    return [float(squared[inside(piece)].mean().sqrt()) for piece in PIECES]


def check(results: dict[str, list[Belief]]) -> None:
    """What this example claims: the first pieces are protected, and unseen ones are uncertain."""
    plain, ours = (errors(results[method][-1]) for method in ("fine-tuning", "OnlineEWC"))
    assert sum(ours[:2]) < 0.5 * sum(plain[:2]), f"errors {ours} against {plain}"
    first = results["OnlineEWC"][0].deviation
    seen, unseen = first[inside(PIECES[0])].mean(), first[inside(PIECES[2])].mean()
    assert unseen > 5 * seen, f"deviation {float(unseen):.2f} unseen, {float(seen):.2f} seen"


def draw(results: dict[str, list[Belief]], data: list[tuple[Tensor, Tensor]], path: Path) -> None:
    """A row for each method, a column for each piece learned."""
    figure = plt.figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    grid = GRID[:, 0]
    for row, (method, beliefs) in zip(axes, results.items(), strict=True):
        colour = VERMILION if method == "fine-tuning" else BLUE
        for learned, (axis, belief) in enumerate(zip(row, beliefs, strict=True), start=1):
            axis.axvspan(*PIECES[learned - 1], color="#efefef", lw=0)
            x, y = data[learned - 1]
            axis.plot(x, y, ".", color=GREY, markersize=2)
            axis.plot(grid, curve(grid), ":", color="black", linewidth=1.5)
            axis.plot(grid, belief.mean, color=colour, linewidth=2)
            if method != "fine-tuning":
                low, high = (belief.mean + side * belief.deviation for side in (-2, 2))
                axis.fill_between(grid, low, high, color=colour, alpha=0.2, lw=0)
            axis.set(xlim=(-3.3, 3.3), ylim=(-3, 3))
        row[0].set_ylabel(method, color=colour, weight="bold")
    for learned, axis in enumerate(axes[0], start=1):
        axis.set_title(f"after piece {learned}", loc="left", weight="bold")
    for axis in axes[1]:
        axis.set_xlabel("x")
    caption = "dots: the data of this piece\ndotted: the true curve"
    axes[0][0].text(0.03, 0.04, caption, transform=axes[0][0].transAxes, color=GREY, fontsize=9)
    caption = "band: two standard deviations"
    axes[1][0].text(0.03, 0.04, caption, transform=axes[1][0].transAxes, color=GREY, fontsize=9)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Compare, print, draw, and check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("functions.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for products this small
    results = compare(options.seed)
    heading = " " * 13 + "".join(f"{f'piece {n}':>9}" for n in range(1, len(PIECES) + 1))
    print("Error on each piece after the last one (root mean square; the noise is 0.1)")
    print(heading)
    for method, beliefs in results.items():
        print(f"{method:13}" + "".join(f"{error:9.3f}" for error in errors(beliefs[-1])))
    print("Standard deviation of OnlineEWC's output, mean over each piece")
    print(heading)
    for learned, belief in enumerate(results["OnlineEWC"], start=1):
        deviations = (float(belief.deviation[inside(piece)].mean()) for piece in PIECES)
        print(f"after piece {learned}" + "".join(f"{one:9.3f}" for one in deviations))
    torch.manual_seed(options.seed)
    draw(results, pieces(), options.out)
    print(f"Picture: {options.out}")
    check(results)


if __name__ == "__main__":
    main()
