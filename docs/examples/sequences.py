"""Sequences of different lengths: an LSTM that predicts the next value of a wave.

The network learns two families of waves, one after the other. The sequences of a batch have
different lengths: they are padded, and a mask says which steps count, in the loss and in the
Fisher information. Each sequence is one sample.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from ewc import EWC, Regression, TimeSeries

# Colours that can be told apart with any colour vision.
BLUE, VERMILION = "#0072B2", "#D55E00"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})

NOISE = 0.05  # standard deviation of the values
LONGEST = 30
SAMPLES = 256  # per task
SEEDS = 3
STEPS = 300  # per task
STRENGTH = 10.0
VARIANCE = 0.01  # of the likelihood: about the squared error that remains

# Waves as functions of the phase, in turns.
WAVES: dict[str, Callable[[Tensor], Tensor]] = {
    "sines": lambda turns: torch.sin(2 * math.pi * turns),
    "sawteeth": lambda turns: 2 * (turns % 1) - 1,
}


class Batch(NamedTuple):
    """Padded sequences: what the likelihood `TimeSeries(..., batch_first=True)` takes."""

    values: Tensor  # [N, S, 1], 0 behind the end
    following: Tensor  # [N, S, 1], the value that follows each
    mask: Tensor  # [N, S], True where there is one

    def part(self, chosen: Tensor) -> Batch:
        """Some of the sequences."""
        return Batch(*(one[chosen] for one in self))


class Predictor(nn.Module):
    """Predicts the next value from all values so far."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 32, batch_first=True)
        self.out = nn.Linear(32, 1)

    def forward(self, values: Tensor) -> Tensor:
        """From `[N, S, 1]` to `[N, S, 1]`."""
        return self.out(self.lstm(values)[0])


def make(wave: Callable[[Tensor], Tensor], samples: int) -> Batch:
    """Waves of random period, phase and length, with some noise."""
    lengths = torch.randint(LONGEST // 4, LONGEST + 1, (samples, 1))
    period = 6 + 6 * torch.rand(samples, 1)
    turns = torch.rand(samples, 1) + torch.arange(LONGEST + 1) / period
    values = (wave(turns) + NOISE * torch.randn(samples, LONGEST + 1))[..., None]
    mask = torch.arange(LONGEST) < lengths
    return Batch(values[:, :-1] * mask[..., None], values[:, 1:] * mask[..., None], mask)


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over the steps that count."""
    errors = (model(batch.values) - batch.following).square()[..., 0]
    return errors[batch.mask].mean()


def learn(
    tasks: list[tuple[Batch, Batch]], strength: float, steps: int = STEPS
) -> tuple[nn.Module, Tensor]:
    """Learn the families one after the other.

    Returns:
        The model, and the error on each family (columns) after each (rows): [tasks, tasks].
    """
    model = Predictor()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    likelihood = TimeSeries(Regression(variance=VARIANCE), batch_first=True)
    regularizer = EWC(model, likelihood, strength=strength)
    rows = []
    for train, _ in tasks:
        for _ in range(steps):
            batch = train.part(torch.randint(SAMPLES, (32,)))
            # The NLL of a value is its squared error divided by twice the variance.
            loss = squared_error(model, batch) / (2 * VARIANCE) + regularizer()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        regularizer.consolidate([train])
        with torch.no_grad():
            rows.append([squared_error(model, test) for _, test in tasks])
    return model, torch.tensor(rows).sqrt()


def compare(seed: int, steps: int = STEPS) -> dict[str, tuple[nn.Module, Tensor]]:
    """With and without EWC, from the same data and the same beginning."""
    results = {}
    for method, strength in (("fine-tuning", 0.0), ("EWC", STRENGTH)):
        torch.manual_seed(seed)
        tasks = [(make(wave, SAMPLES), make(wave, 200)) for wave in WAVES.values()]
        results[method] = learn(tasks, strength, steps)
    return results


def check(errors: dict[str, Tensor]) -> None:
    """What this example claims: the first family is forgotten less, and the second learned."""
    plain, ours = errors["fine-tuning"], errors["EWC"]
    assert ours[-1, 0] < 0.8 * plain[-1, 0], f"{ours[-1]} against {plain[-1]}"
    assert ours[-1, 1] < 0.8 * ours[0, 1], f"the second family is not learned: {ours[:, 1]}"


@torch.no_grad()
def draw(errors: dict[str, Tensor], models: dict[str, nn.Module], seed: int, path: Path) -> None:
    """Left, the errors after the last family; right, predictions of one model for each family."""
    torch.manual_seed(seed + 100)
    figure = plt.figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    bars = left.subplots()
    looks = {"fine-tuning": (VERMILION, "--"), "EWC": (BLUE, "-")}
    for shift, (method, rows) in zip((-0.2, 0.2), errors.items(), strict=True):
        places = [family + shift for family in range(len(WAVES))]
        drawn = bars.bar(places, rows[-1].tolist(), 0.38, color=looks[method][0], label=method)
        bars.bar_label(drawn, fmt="%.2f")
    bars.set_xticks(range(len(WAVES)), WAVES)
    bars.set_ylabel("error of the next value (RMS)")
    bars.set_title("After both families", loc="left", weight="bold")
    bars.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, -0.25), ncols=2)
    axes = right.subplots(len(WAVES), 1, sharex=True)
    for axis, (name, wave) in zip(axes, WAVES.items(), strict=True):
        example = make(wave, 1)
        steps = torch.arange(1, LONGEST + 1)[example.mask[0]]
        axis.plot(steps, example.following[example.mask], "o", color="black", markersize=4)
        for method, model in models.items():
            colour, style = looks[method]
            predicted = model(example.values)[example.mask]
            axis.plot(steps, predicted, style, color=colour, linewidth=2)
        axis.set_ylabel(name, weight="bold")
    axes[0].set_title("The next value, predicted (dots: true)", loc="left", weight="bold")
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Compare, print, draw, and check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("sequences.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for products this small
    runs = [compare(options.seed + i) for i in range(SEEDS)]
    models = {method: model for method, (model, _) in runs[0].items()}
    errors = {m: torch.stack([run[m][1] for run in runs]).mean(0) for m in models}
    print(f"Error of the next value after both families (root mean square, mean of {SEEDS} seeds)")
    print(" " * 12 + "".join(f"{name:>10}" for name in WAVES))
    for method, rows in errors.items():
        print(f"{method:12}" + "".join(f"{float(error):10.2f}" for error in rows[-1]))
    draw(errors, models, options.seed, options.out)
    print(f"Picture: {options.out}")
    check(errors)


if __name__ == "__main__":
    main()
