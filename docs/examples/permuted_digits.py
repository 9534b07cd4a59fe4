"""Catastrophic forgetting, and EWC against it, on a sequence of permuted handwritten digits.

One small network learns five tasks, one after the other. Each task has scikit-learn's digits (1797
real images of 8 x 8 pixels) with the pixels in another order. While a task is learned, the data of
the earlier tasks is not available; only joint training, the upper bound, has it.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from ewc import EWC, Classification, OnlineEWC

matplotlib.use("Agg")  # a picture in a file needs no display
import matplotlib.pyplot as plt

TASKS, STEPS, BATCH, TEST = 5, 250, 32, 360
COLOURS = {  # those of Okabe and Ito, told apart with any colour vision
    "joint training": "#595959",
    "EWC": "#0072B2",
    "OnlineEWC": "#009E73",
    "fine-tuning": "#D55E00",
}


def permuted_digits(seed: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each task: inputs `[N, 64]` in [0, 1] and labels `[N]`, for training and for testing."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[TEST:], order[:TEST]
    pixels = [torch.randperm(64, generator=generator) for _ in range(TASKS)]
    return [(x[train][:, p], y[train], x[test][:, p], y[test]) for p in pixels]


def learn(method: str, seed: int, steps: int = STEPS, hidden: int = 300) -> Tensor:
    """Learn all tasks in turn; the test accuracy after each task (row) on each task (column)."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, hidden), nn.ReLU(),
        nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    regularizer = None
    if method in ("EWC", "OnlineEWC"):
        kind = EWC if method == "EWC" else OnlineEWC
        regularizer = kind(model, Classification())
    tasks = permuted_digits(seed)
    rows = []
    for t, (x, y, _, _) in enumerate(tasks):
        if method == "joint training":
            x, y = (torch.cat([task[part] for task in tasks[: t + 1]]) for part in (0, 1))
        for _ in range(steps):
            chosen = torch.randint(len(x), (BATCH,))
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            if regularizer is not None:
                loss = loss + regularizer()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if regularizer is not None:
            regularizer.consolidate([(x, y)])
        with torch.no_grad():
            right = [model(x_test).argmax(1) == y_test for _, _, x_test, y_test in tasks]
        rows.append(torch.stack([each.float().mean() for each in right]))
    return torch.stack(rows)


def table(found: dict[str, Tensor]) -> str:
    """Accuracy after the last task, of each method on each task and on average."""
    seeds = len(next(iter(found.values())))
    head = [*(f"task {t + 1}" for t in range(TASKS)), "average"]
    lines = [
        f"Test accuracy after the last task, in percent (mean ± deviation over {seeds} seeds)",
        " " * 14 + "".join(f"{title:>14}" for title in head),
    ]
    for method, accuracy in found.items():
        last = 100 * accuracy[:, -1]
        columns = [*last.T, last.mean(1)]
        cells = [f"{c.mean():5.1f} ± {c.std(correction=min(1, seeds - 1)):4.1f}" for c in columns]
        lines.append(f"{method:14}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def draw(found: dict[str, Tensor], path: Path) -> None:
    """Save a picture: the average over the tasks so far, and the first task by itself."""
    after = range(1, TASKS + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for method, accuracy in found.items():
        averages = torch.stack([accuracy[:, t, : t + 1].mean(1) for t in range(TASKS)], 1)
        for axis, runs in ((left, 100 * averages), (right, 100 * accuracy[:, :, 0])):
            colour = COLOURS[method]
            axis.plot(after, runs.mean(0), color=colour, linewidth=2, marker="o", label=method)
            axis.fill_between(after, runs.amin(0), runs.amax(0), color=colour, alpha=0.18, lw=0)
    left.set(ylim=(0, 101), ylabel="test accuracy (%)", title="Average over the tasks so far")
    right.set_title("The first task")
    for axis in (left, right):
        axis.set(xticks=after, xlabel="tasks learned, one after the other")
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(loc="lower left", title="line: mean; band: worst to best seed")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Compare the methods, print and draw the results, and check them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("permuted_digits.png"), help="picture")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for products this small
    jobs = [(method, seed) for method in COLOURS for seed in range(arguments.seeds)]
    runs = {job: learn(*job) for job in tqdm(jobs, unit="run")}
    found = {m: torch.stack([runs[m, s] for s in range(arguments.seeds)]) for m in COLOURS}
    print(table(found))
    draw(found, arguments.out)
    print(f"Picture: {arguments.out}")
    for method in ("EWC", "OnlineEWC"):
        gain = (found[method] - found["fine-tuning"])[:, -1].mean(1)
        assert (gain > 0.2).all(), f"{method} gains only {gain.tolist()} on fine-tuning"


if __name__ == "__main__":
    main()
