"""What the choices of `EWC` cost and bring, on sequences of tasks made of handwritten digits.

One table for each choice, in `docs/choosing.md`. Accuracies are the average over all tasks at the
end of the sequence, the first task's and the last one's: what is kept, and what is still learned.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import _digits
import torch
import torch.nn.functional as F
from _digits import Learner, Task
from _harness import interleave, machine, number, table, write
from torch import Tensor, nn

from ewc import EWC, Classification, OnlineEWC

PAGE = Path(__file__).parent.parent / "choosing.md"
STRENGTHS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
STRENGTH = 30.0
"""Where a table is not about strength."""


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    seeds: int = 5
    tasks: int = 5
    steps: int = 250  # per task
    rounds: int = 9  # of timings


@dataclass(frozen=True)
class Job:
    """A sequence of tasks, learned by one network."""

    data: str = "permuted"
    kind: str = "EWC"
    strength: float = STRENGTH
    decay: float = 1.0
    fisher_type: str = "empirical"
    reduction: str = "mean"
    max_samples: int | None = None

    def tasks(self, scale: Scale, seed: int) -> list[Task]:
        """The data."""
        if self.data == "permuted":
            return _digits.permuted(scale.tasks, seed)
        return _digits.split(scale.tasks, seed, head_per_task=self.data == "heads")

    def protect(self, model: nn.Module) -> EWC | None:
        """What the penalty comes from; `None` for plain fine-tuning."""
        if self.kind == "none":
            return None
        configured = partial(
            EWC if self.kind == "EWC" else partial(OnlineEWC, decay=self.decay),
            strength=self.strength,
            fisher_type=self.fisher_type,
            reduction=self.reduction,
            max_samples=self.max_samples,
        )
        return configured(model, Classification())


class Result(NamedTuple):
    """How one seed ended: accuracies on the tasks in order, and the largest curvature."""

    accuracies: list[float]
    largest: float


@cache
def run(job: Job, scale: Scale, seed: int) -> Result:
    """Learn all tasks."""
    learner = Learner(seed, scale.steps)
    learner.ewc = job.protect(learner.model)
    tasks = job.tasks(scale, seed)
    largest = 0.0
    for task in tasks:
        learner.learn(task)
        if math.isnan(learner.accuracy(task)):
            return Result([math.nan] * len(tasks), math.nan)
        largest = learner.consolidate(task)
    return Result([learner.accuracy(task) for task in tasks], largest)


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest of the seeds, in percent."""
    lost = sum(map(math.isnan, values))
    if lost:
        return f"diverges ({lost} of {len(values)})"
    percent = [100 * value for value in values]
    return f"{statistics.median(percent):.0f} ({min(percent):.0f} to {max(percent):.0f})"


def accuracies(job: Job, scale: Scale) -> list[str]:
    """Average, first and last task."""
    results = [run(job, scale, seed).accuracies for seed in range(scale.seeds)]
    return [
        spread([statistics.fmean(each) for each in results]),
        spread([each[0] for each in results]),
        spread([each[-1] for each in results]),
    ]


def average(job: Job, scale: Scale) -> str:
    """The average over all tasks."""
    return accuracies(job, scale)[0]


def product(job: Job, scale: Scale) -> str:
    """Lr * strength * largest at the end, as a share of its bound 2 (1 + momentum)."""
    (group,) = _digits.momentum(iter([nn.Parameter(torch.zeros(1))])).param_groups
    results = [run(job, scale, seed).largest for seed in range(scale.seeds)]
    if any(map(math.isnan, results)):
        return "-"
    bound = 2 * (1 + group["momentum"])
    return number(group["lr"] * job.strength * statistics.median(results) / bound)


@cache
def trained(scale: Scale, seed: int) -> tuple[nn.Module, Task]:
    """A network that has learned one task, and the task."""
    (task,) = _digits.permuted(1, seed)
    learner = Learner(seed, scale.steps)
    learner.learn(task)
    return learner.model, task


@cache
def fisher(scale: Scale, seed: int, fisher_type: str, max_samples: int | None = None) -> Tensor:
    """The Fisher of that network as one vector."""
    model, task = trained(scale, seed)
    ewc = EWC(model, Classification(), fisher_type=fisher_type, max_samples=max_samples)
    ewc.consolidate(task.batches(), generator=torch.Generator().manual_seed(seed))
    return torch.cat([each.flatten() for each in ewc.fisher.values()])


def agreement(
    scale: Scale, one: Callable[[int], Tensor], full: Callable[[int], Tensor]
) -> list[str]:
    """Relative error and correlation of two Fishers, and the ratio of their largest entries."""
    pairs = [(one(seed), full(seed)) for seed in range(scale.seeds)]
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    correlations = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
    largest = [float(a.max() / b.max()) for a, b in pairs]
    return [number(statistics.median(each)) for each in (errors, correlations, largest)]


# One table for each choice ------------------------------------------------------------------


def types(scale: Scale) -> str:
    """Fisher type: accuracy at three strengths, and what a consolidation costs."""
    model, task = trained(scale, 0)
    parameters = list(model.parameters())
    batches = 8 * list(task.batches())  # one pass is too short to be timed, and mostly start-up

    def ordinary() -> None:
        for x, y in batches:
            torch.autograd.grad(F.cross_entropy(model(x), y), parameters)

    weak = (10.0, 30.0, 100.0)
    kinds = ("empirical", "exact", "mc")
    calls: dict[str, Callable[[], object]] = {"ordinary": ordinary}
    for kind in kinds:
        calls[kind] = partial(EWC(model, Classification(), fisher_type=kind).consolidate, batches)
    timings = interleave(calls, scale.rounds)
    rows = [
        [
            f'`"{kind}"`',
            number(timings.ratio(kind, "ordinary")),
            agreement(
                scale,
                partial(fisher, scale, fisher_type=kind),
                partial(fisher, scale, fisher_type="exact"),
            )[1],
            *(average(Job(fisher_type=kind, strength=each), scale) for each in weak),
        ]
        for kind in kinds
    ]
    head = ["`fisher_type`", "cost, forward + backward = 1", "correlation with exact"]
    return table([*head, *(f"strength {each:g}" for each in weak)], rows)


def memory(scale: Scale) -> str:
    """Separate penalties, or one that fades."""
    jobs = {
        "fine-tuning": Job(kind="none"),
        "`EWC`": Job(),
        **{
            f"`OnlineEWC(decay={decay})`": Job(kind="OnlineEWC", decay=decay)
            for decay in (1.0, 0.9, 0.7, 0.5, 0.3)
        },
    }
    rows = [
        [name, *accuracies(job, scale), "-" if job.kind == "none" else product(job, scale)]
        for name, job in jobs.items()
    ]
    head = ["", "average", "first task", "last task", "share of the bound"]
    return table(head, rows)


def heads(scale: Scale) -> str:
    """Two digits in each task: a head for each, or one for all."""
    rows = []
    for data, title in (("heads", "a head per task"), ("single", "one head for all")):
        rows.append([f"{title}: fine-tuning", *accuracies(Job(data, "none"), scale)])
        for each in (1e3, 1e4):
            name = f"{title}: `EWC`, strength {each:g}"
            rows.append([name, *accuracies(Job(data, strength=each), scale)])
    return table(["two digits per task", "average", "first task", "last task"], rows)


def samples(scale: Scale) -> str:
    """How many samples the Fisher needs."""
    rows = []
    for count in (10, 30, 100, 300, None):
        errors = agreement(
            scale,
            partial(fisher, scale, fisher_type="empirical", max_samples=count),
            partial(fisher, scale, fisher_type="empirical"),
        )
        name = str(count) if count else f"all {len(trained(scale, 0)[1].x):,}"
        rows.append([name, *errors, average(Job(max_samples=count), scale)])
    head = ["`max_samples`", "relative error", "correlation", "largest, full = 1", "accuracy"]
    return table(head, rows)


def strength(scale: Scale) -> str:
    """A grid, on a logarithmic scale, that begins with the Laplace approximation's own value."""
    count = len(trained(scale, 0)[1].x)
    jobs = {
        f'1/{count}, `reduction="sum"`': Job(strength=1 / count, reduction="sum"),
        **{f"{each:g}": Job(strength=each) for each in STRENGTHS},
    }
    rows = [[name, *accuracies(job, scale), product(job, scale)] for name, job in jobs.items()]
    return table(["`strength`", "average", "first task", "last task", "share of the bound"], rows)


class Step(NamedTuple):
    """A way to step, and what lr * strength * largest must stay below."""

    build: _digits.Optimizer
    bound: float
    products: tuple[float, ...]

    @property
    def lr(self) -> float:
        """Its learning rate."""
        (group,) = self.build(iter([nn.Parameter(torch.zeros(1))])).param_groups
        return float(group["lr"])


STEPS = {
    "SGD, lr 0.2": Step(partial(torch.optim.SGD, lr=0.2), 2.0, (0.2, 1.0, 1.8, 2.2, 4.0)),
    "SGD, lr 0.05, momentum 0.9": Step(_digits.momentum, 3.8, (0.2, 1.0, 1.8, 3.4, 4.2, 8.0)),
    "Adam, lr 0.001": Step(
        partial(torch.optim.Adam, lr=1e-3), math.inf, (0.001, 0.01, 0.1, 1.0, 10.0)
    ),
}


def protected(step: Step, product: float, scale: Scale, seed: int) -> tuple[Learner, Task, Task]:
    """A network that has learned the first of two tasks, with that lr * strength * largest."""
    first, second = _digits.permuted(2, seed)
    learner = Learner(seed, scale.steps, optimizer=step.build)
    learner.learn(first)
    learner.ewc = EWC(learner.model, Classification())
    learner.ewc.strength = product / (step.lr * learner.consolidate(first))
    return learner, first, second


def alone(step: Step, product: float, scale: Scale, seed: int) -> float:
    """What as many steps as two tasks have make of the penalty alone, from beside the anchor."""
    learner, _, _ = protected(step, product, scale, seed)
    assert learner.ewc is not None
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=learner.generator)
    optimizer = step.build(learner.model.parameters())
    values = []
    for _ in range(2 * scale.steps):
        penalty = learner.ewc()
        values.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    return values[-1] / values[0] if math.isfinite(values[-1]) else math.inf


def optimizer(scale: Scale) -> str:
    """Two tasks, the second below and above the bound of the step."""
    rows = []
    for name, step in STEPS.items():
        for product in step.products:
            lone = [alone(step, product, scale, seed) for seed in range(scale.seeds)]
            first, second = [], []
            for seed in range(scale.seeds):
                learner, *tasks = protected(step, product, scale, seed)
                learner.learn(tasks[1])
                first.append(learner.accuracy(tasks[0]))
                second.append(learner.accuracy(tasks[1]))
            bound = "none" if math.isinf(step.bound) else f"{step.bound:g}"
            growth = "grows" if statistics.median(lone) > 1 else "shrinks"
            rows.append([name, f"{product:g}", bound, growth, spread(first), spread(second)])
    head = ["", "lr · strength · largest", "bound", "the penalty alone"]
    return table([*head, "first task", "second task"], rows)


TABLES: dict[str, Callable[[Scale], str]] = {
    each.__name__: each for each in (types, memory, heads, samples, strength, optimizer)
}


def report(name: str, scale: Scale, quick: bool) -> str:
    """The command, one table, and where its numbers come from."""
    command = f"`python docs/benchmarks/choices.py {name}{' --quick' if quick else ''}`"
    seeds = f"Medians of {scale.seeds} seeds, and the lowest and highest"
    where = f"{seeds}. {machine('scikit-learn')}."
    return f"{command}\n\n{TABLES[name](scale)}\n\n{where}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--quick", action="store_true", help="two seeds, two tasks, few steps")
    parser.add_argument("--write", action="store_true", help=f"also write into {PAGE.name}")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.tables if name not in TABLES]
    if unknown:
        parser.error(f"no table is called {unknown[0]}; there are {', '.join(TABLES)}")
    torch.set_num_threads(1)  # for products this small, threads only wait for each other
    scale = Scale(seeds=2, tasks=2, steps=50, rounds=3) if arguments.quick else Scale()
    for name in arguments.tables or TABLES:
        text = report(name, scale, arguments.quick)
        print(text, end="\n\n")
        if arguments.write:
            write(f"choices {name}", text, PAGE)


if __name__ == "__main__":
    main()
