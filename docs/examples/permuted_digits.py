"""Forgetting, and not forgetting: a sequence of permuted handwritten digits.

One small network learns several tasks, one after the other. Each task is scikit-learn's digits
(1797 real images of 8 x 8 pixels) with its pixels in another order, so that the tasks are equally
hard and have nothing in common. While a task is learned, the data of the earlier ones is gone.

    fine-tuning      goes on training, and forgets
    EWC              remembers each task by its Fisher information and parameters
    OnlineEWC        the same with one running Fisher and the latest parameters
    joint training   still has the data of all tasks so far: the upper bound

Run `python permuted_digits.py --help` for the options. The data comes with scikit-learn: nothing
is downloaded.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from ewc import EWC, Classification, OnlineEWC

matplotlib.use("Agg")  # a picture in a file needs no display
import matplotlib.pyplot as plt

TEST_SAMPLES = 360
SWEEP = (10.0, 100.0, 200.0)
WIDE_MARGIN = 0.2


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers."""

    tasks: int = 5
    seeds: int = 3
    strength: float = 100.0
    sweep: bool = True
    steps: int = 250  # per task
    batch_size: int = 32
    hidden: int = 300
    lr: float = 0.05
    momentum: float = 0.9
    evaluations: int = 5  # per task

    @property
    def bound(self) -> float:
        """What lr * strength * largest Fisher must stay below, or the penalty diverges."""
        return 2 * (1 + self.momentum)


class Job(NamedTuple):
    """One network, trained on all the tasks by one method."""

    method: str
    seed: int
    strength: float = 0.0
    reduction: str = "mean"

    @property
    def name(self) -> str:
        """The key of this job's results."""
        return f"{self.method}, strength={self.strength:g}, {self.reduction}, seed={self.seed}"


METHODS = ("joint training", "EWC", "OnlineEWC", "fine-tuning")


def comparison(settings: Settings) -> dict[str, list[Job]]:
    """The jobs of the table and the picture: every method with every seed."""
    strengths = {"EWC": settings.strength, "OnlineEWC": settings.strength}
    return {
        method: [Job(method, seed, strengths.get(method, 0.0)) for seed in range(settings.seeds)]
        for method in METHODS
    }


def sweep(settings: Settings, samples: int) -> dict[str, Job]:
    """The jobs of the sweep over `strength`, and the Laplace approximation's own value.

    With a mean loss, -log posterior / N = loss + (1 / N) * sum over old tasks of N_t * F_t * ...:
    `reduction="sum"` gives N_t * F_t, and the strength is 1 / N, N the present task's samples.
    """
    if not settings.sweep:
        return {}
    laplace = {f'1/{samples}, reduction="sum"': Job("EWC", 0, 1 / samples, "sum")}
    return laplace | {f"{strength:g}": Job("EWC", 0, strength) for strength in SWEEP}


# The data -----------------------------------------------------------------------------------


class Task(NamedTuple):
    """One permutation of the digits: `x` is [samples, 64] in [0, 1], `y` is [samples]."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def permuted_digits(n_tasks: int, seed: int) -> list[Task]:
    """The digits, split into training and test data, with the pixels of each task permuted."""
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=generator)
    test, train = order[:TEST_SAMPLES], order[TEST_SAMPLES:]
    pixels = [torch.randperm(x.shape[1], generator=generator) for _ in range(n_tasks)]
    return [Task(x[train][:, p], y[train], x[test][:, p], y[test]) for p in pixels]


def merge(tasks: list[Task]) -> Task:
    """All the data of several tasks as one."""
    return Task(*(torch.cat(parts) for parts in zip(*tasks, strict=True)))


# The learning -------------------------------------------------------------------------------


class Learner:
    """A network, its optimizer and its memory of earlier tasks."""

    def __init__(self, job: Job, settings: Settings) -> None:
        self.job, self.settings = job, settings
        torch.manual_seed(job.seed)
        hidden = settings.hidden
        self.model = nn.Sequential(
            nn.Linear(64, hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 10),
        )  # fmt: skip
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=settings.lr, momentum=settings.momentum
        )
        self.ewc: EWC | OnlineEWC | None = None
        if job.method in ("EWC", "OnlineEWC"):
            kind = EWC if job.method == "EWC" else OnlineEWC
            self.ewc = kind(
                self.model, Classification(), strength=job.strength, reduction=job.reduction
            )
        self.generator = torch.Generator().manual_seed(job.seed)
        self.curve: list[list[float]] = []  # at each evaluation, the accuracy on each task
        self.largest = 0.0  # the largest entry of the Fisher

    def learn(self, tasks: list[Task], t: int) -> None:
        """Train on task `t`, with an eye on the test data of all tasks, then consolidate."""
        data = merge(tasks[: t + 1]) if self.job.method == "joint training" else tasks[t]
        every = self.settings.steps // self.settings.evaluations
        if t == 0:
            self.curve.append(accuracies(self.model, tasks))
        for step, (x, y) in enumerate(self.random_batches(data), start=1):
            loss = F.cross_entropy(self.model(x), y)
            if self.ewc is not None:
                loss = loss + self.ewc()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if step % every == 0:
                self.curve.append(accuracies(self.model, tasks))
        if not loss.isfinite():
            raise SystemExit(
                f"{self.job.name}: diverged while learning task {t + 1}. lr * strength * largest "
                f"Fisher was {self.settings.lr * self.job.strength * self.largest:.2f}, and must "
                f"stay below 2 (1 + momentum) = {self.settings.bound:.2f}: use a lower --strength."
            )
        if self.ewc is not None:
            summary = self.ewc.consolidate(zip(data.x.split(256), data.y.split(256), strict=True))
            self.largest = summary.largest

    def random_batches(self, data: Task) -> Iterator[tuple[Tensor, Tensor]]:
        """As many batches as there are steps, drawn with replacement."""
        for _ in range(self.settings.steps):
            size = (self.settings.batch_size,)
            chosen = torch.randint(len(data.x), size, generator=self.generator)
            yield data.x[chosen], data.y[chosen]

    def state_dict(self) -> dict[str, Any]:
        """All that the next task depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ewc": None if self.ewc is None else self.ewc.state_dict(),
            "generator": self.generator.get_state(),
            "curve": self.curve,
            "largest": self.largest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ewc is not None:
            self.ewc.load_state_dict(state["ewc"])
        self.generator.set_state(state["generator"])
        self.curve, self.largest = state["curve"], state["largest"]


@torch.no_grad()
def accuracies(model: nn.Module, tasks: list[Task]) -> list[float]:
    """The share of each task's test data that the model classifies rightly."""
    outputs = model(torch.stack([task.x_test for task in tasks]))
    right = outputs.argmax(-1) == torch.stack([task.y_test for task in tasks])
    return [float(share) for share in right.float().mean(-1)]


class Result(NamedTuple):
    """What remains of a finished job."""

    curve: Tensor  # [evaluations, tasks]
    largest: float

    @property
    def final(self) -> Tensor:
        """Accuracy on each task after the last one: [tasks]."""
        return self.curve[-1]


def run_all(
    jobs: list[Job],
    settings: Settings,
    resume: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
) -> dict[str, Result]:
    """Run the jobs in turn; call `save` with everything there is to know after each task."""
    finished: dict[str, Any] = dict(resume["finished"]) if resume else {}
    current = resume["current"] if resume else None
    with tqdm(total=len(jobs) * settings.tasks, unit="task") as bar:
        for job in jobs:
            bar.set_description(f"{job.method}, seed {job.seed}")
            if job.name in finished:
                bar.update(settings.tasks)
                continue
            tasks = permuted_digits(settings.tasks, job.seed)
            learner, done = Learner(job, settings), 0
            if current is not None and current["job"] == job.name:
                learner.load_state_dict(current["learner"])
                done = current["done"]
                bar.update(done)
            for t in range(done, settings.tasks):
                learner.learn(tasks, t)
                current = {"job": job.name, "done": t + 1, "learner": learner.state_dict()}
                save({"settings": asdict(settings), "finished": finished, "current": current})
                bar.update()
            finished[job.name] = {"curve": learner.curve, "largest": learner.largest}
    return {
        name: Result(torch.tensor(result["curve"]), result["largest"])
        for name, result in finished.items()
    }


# The checkpoint -----------------------------------------------------------------------------


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write to the side, then replace: an interruption never leaves half a file."""
    beside = path.with_name(path.name + ".new")
    torch.save(state, beside)
    os.replace(beside, path)


def load_checkpoint(path: Path, settings: Settings) -> dict[str, Any]:
    """Read a checkpoint; refuse one that was written with other settings."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    ours = asdict(settings)
    differing = [
        f"{key} is {ours.get(key)}, in the file {value}"
        for key, value in state["settings"].items()
        if ours.get(key) != value
    ]
    if differing:
        raise SystemExit(f"{path} was written with other settings: {'; '.join(differing)}")
    return state


# The report ---------------------------------------------------------------------------------


def spread(values: Tensor) -> str:
    """Mean and standard deviation over seeds, in percent."""
    percent = 100 * values
    deviation = percent.std() if len(percent) > 1 else torch.zeros(())
    return f"{percent.mean():5.1f} ± {deviation:4.1f}"


def table(results: Mapping[str, list[Result]]) -> str:
    """Accuracy after the last task, of each method on each task and on average."""
    n_seeds, n_tasks = len(results["EWC"]), len(results["EWC"][0].final)
    head = [f"task {t + 1}" for t in range(n_tasks)] + ["average"]
    lines = [
        f"Test accuracy after the last task, in percent (mean ± deviation over {n_seeds} seeds)",
        " " * 14 + "".join(f"{title:>14}" for title in head),
    ]
    for method, runs in results.items():
        final = torch.stack([run.final for run in runs])  # [seeds, tasks]
        cells = [spread(column) for column in final.T] + [spread(final.mean(1))]
        lines.append(f"{method:14}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def stability(settings: Settings, largest: float) -> str:
    """How strong the penalty may be before gradient descent on it diverges."""
    product = settings.lr * settings.strength * largest
    limit = settings.bound / (settings.lr * largest)
    return (
        f"Stability: lr * strength * largest Fisher = {settings.lr:g} * {settings.strength:g} * "
        f"{largest:.3g} = {product:.2f},\nmust stay below 2 (1 + momentum) = {settings.bound:.2f}: "
        f"at this lr, strength < {limit:.0f}"
    )


def sweep_table(results: Mapping[str, Result]) -> str:
    """Accuracy against strength."""
    lines = [
        "EWC against strength (seed 0; the first row is what the Laplace approximation gives)",
        f"{'strength':>26}{'average':>10}{'first task':>12}{'last task':>12}",
    ]
    for label, result in results.items():
        shares = (result.final.mean(), result.final[0], result.final[-1])
        average, first, last = (f"{100 * share:.1f}" for share in shares)
        lines.append(f"{label:>26}{average:>10}{first:>12}{last:>12}")
    return "\n".join(lines)


def check(results: Mapping[str, list[Result]]) -> None:
    """What this example claims, for every seed."""
    for method in ("EWC", "OnlineEWC"):
        for ours, plain in zip(results[method], results["fine-tuning"], strict=True):
            gain = float(ours.final.mean() - plain.final.mean())
            assert gain > WIDE_MARGIN, f"{method} gains only {gain:.2f} on fine-tuning"


# The picture --------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart with any colour vision, and line styles besides.
LOOKS: dict[str, dict[str, Any]] = {
    "joint training": {"color": "#595959", "linestyle": ":"},
    "EWC": {"color": "#0072B2", "linestyle": "-"},
    "OnlineEWC": {"color": "#009E73", "linestyle": "--"},
    "fine-tuning": {"color": "#D55E00", "linestyle": "-"},
}


def draw(results: Mapping[str, list[Result]], settings: Settings, path: Path) -> None:
    """Save a picture: the average after each task, and each task over time."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(11, 5.4), layout="constrained", facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    draw_averages(left.subplots(), results, settings)
    axes = right.subplots(settings.tasks, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for t, axis in enumerate(axes):
        draw_task(axis, t, results, settings)
    axes[0].set_title("Each task while all of them are learned", loc="left", weight="bold")
    axes[-1].set_xticks(
        [(t + 0.5) * settings.steps for t in range(settings.tasks)],
        [f"learning\ntask {t + 1}" for t in range(settings.tasks)],
    )
    for axis in axes:
        axis.tick_params(axis="x", length=0)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def draw_band(axis: Any, x: Tensor, runs: Tensor, method: str) -> None:
    """The mean over seeds, in a band from the worst to the best of them; `runs` is [seeds, x]."""
    axis.plot(x, runs.mean(0), linewidth=2, **LOOKS[method])
    axis.fill_between(
        x, runs.min(0).values, runs.max(0).values, color=LOOKS[method]["color"], alpha=0.18, lw=0
    )


def draw_averages(axis: Any, results: Mapping[str, list[Result]], settings: Settings) -> None:
    """Average accuracy on the tasks so far, after each task, labelled at the lines' ends."""
    after = torch.arange(1, settings.tasks + 1)
    ends: dict[str, float] = {}
    for method, runs in results.items():
        averages = torch.stack(
            [
                torch.stack(
                    [run.curve[n * settings.evaluations, :n].mean() for n in after.tolist()]
                )
                for run in runs
            ]
        )  # [seeds, tasks]
        draw_band(axis, after, 100 * averages, method)
        ends[method] = 100 * float(averages[:, -1].mean())
    for method, height in spaced(ends, gap=4.5).items():
        axis.annotate(
            method, (settings.tasks, height), xytext=(8, 0), textcoords="offset points",
            va="center", color=LOOKS[method]["color"], weight="bold", annotation_clip=False,
        )  # fmt: skip
    axis.set(ylim=(0, 101), xticks=after.tolist(), xlabel="tasks learned, one after the other")
    axis.set_ylabel("test accuracy (%)")
    axis.set_title("Average over the tasks so far", loc="left", weight="bold")
    axis.grid(axis="y", color="#dddddd", linewidth=0.8)
    caption = f"line: mean of {settings.seeds} seeds\nband: from the worst to the best"
    axis.text(0.03, 0.03, caption, transform=axis.transAxes, color="#595959", fontsize=10)


def draw_task(axis: Any, t: int, results: Mapping[str, list[Result]], settings: Settings) -> None:
    """Accuracy on one task from the moment it is learned."""
    begin = t * settings.evaluations
    every = settings.steps // settings.evaluations
    axis.axvspan(t * settings.steps, (t + 1) * settings.steps, color="#efefef", lw=0)
    for method, runs in results.items():
        curves = torch.stack([run.curve[begin:, t] for run in runs])  # [seeds, evaluations]
        steps = every * torch.arange(begin, begin + curves.shape[1])
        draw_band(axis, steps, 100 * curves, method)
    axis.set(xlim=(0, settings.tasks * settings.steps), ylim=(0, 104), yticks=(0, 50, 100))
    axis.set_ylabel(f"task {t + 1}", rotation=0, ha="right", va="center", weight="bold")


def spaced(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Move labels apart, from the top down, so that none covers another."""
    placed: dict[str, float] = {}
    ceiling = float("inf")
    for label, height in sorted(heights.items(), key=lambda item: -item[1]):
        placed[label] = min(height, ceiling)
        ceiling = placed[label] - gap
    return placed


# The command --------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The options; their defaults take less than a minute on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    default = Settings()
    add("--tasks", type=int, default=default.tasks, help="length of the sequence (%(default)s)")
    add("--seeds", type=int, default=default.seeds, help="repetitions (%(default)s)")
    add("--strength", type=float, default=default.strength, help="lambda (%(default)g)")
    add("--no-sweep", action="store_true", help="leave out the sweep over strength")
    add("--out", type=Path, default=Path("permuted_digits.png"), help="picture (%(default)s)")
    add("--checkpoint", type=Path, metavar="FILE", help="keep the state in FILE, task by task")
    add("--resume", type=Path, metavar="FILE", help="continue from FILE, and keep it up to date")
    return parser.parse_args()


def main() -> None:
    """Compare the methods, print what came out, draw it, and check it."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # for products this small, threads only wait for each other
    settings = Settings(
        tasks=arguments.tasks,
        seeds=arguments.seeds,
        strength=arguments.strength,
        sweep=not arguments.no_sweep,
    )
    resume = load_checkpoint(arguments.resume, settings) if arguments.resume else None
    checkpoint = arguments.checkpoint or arguments.resume

    def save(state: dict[str, Any]) -> None:
        if checkpoint is not None:
            save_checkpoint(checkpoint, state)

    compared = comparison(settings)
    swept = sweep(settings, samples=len(permuted_digits(1, seed=0)[0].x))
    jobs = [job for jobs in compared.values() for job in jobs] + list(swept.values())
    results = run_all(list(dict.fromkeys(jobs)), settings, resume, save)

    methods = {method: [results[job.name] for job in jobs] for method, jobs in compared.items()}
    print(table(methods), end="\n\n")
    print(stability(settings, max(run.largest for run in methods["EWC"])), end="\n\n")
    if swept:
        print(sweep_table({label: results[job.name] for label, job in swept.items()}), end="\n\n")
    draw(methods, settings, arguments.out)
    print(f"Picture: {arguments.out}")
    # The claim is about the set-up above; another length or strength is yours to explore.
    if settings == Settings(seeds=settings.seeds, sweep=settings.sweep):
        check(methods)


if __name__ == "__main__":
    main()
