"""How the time grows: with samples, with width, with classes, with tasks, with processes.

Ordinary forward and backward and a consolidation take turns, at every size, in one interleaved run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for the processes that this one starts

import _harness
import torch
import torch.distributed as dist
from _harness import interleave, number, table
from _models import GPT, Batch, Workload, gradients, mlp, tokens, vectors
from _processes import together
from torch import Tensor, nn

from ewc import EWC, Classification

TASKS = (1, 3, 10, 30, 100)
CLASSES = (2, 8, 32, 128)
PROCESSES = (1, 2)


def samples(arguments: argparse.Namespace) -> str:
    """Time against the number of samples, at one batch size."""
    counts = (1, 4, 16) if arguments.quick else (1, 4, 16, 64)
    workload = Workload("MLP", mlp, vectors(784), 128, max(counts))
    model, batches = workload.build().eval(), workload.data(max(counts))
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for count in counts:
        calls["ordinary", count] = _ordinary(model, batches[:count])
        calls["ewc", count] = _consolidation(model, batches[:count])
    timings = interleave(calls, arguments.rounds)
    rows = [
        [
            f"{count * workload.batch_size:,}",
            number(1e3 * timings.median(("ordinary", count))),
            number(1e3 * timings.median(("ewc", count))),
            number(timings.ratio(("ewc", count), ("ordinary", count))),
        ]
        for count in counts
    ]
    head = ["MLP 784-400-400-10, samples", "forward + backward, ms", "consolidation, ms", "ratio"]
    return table(head, rows)


def width(arguments: argparse.Namespace) -> str:
    """Time against the width of a model."""
    sizes: dict[str, tuple[nn.Module, list[Batch]]] = {}
    for hidden in (200, 400) if arguments.quick else (100, 200, 400, 800, 1600):
        workload = Workload("", partial(mlp, hidden), vectors(784), 128, 32)
        sizes[f"MLP 784-{hidden}-{hidden}-10"] = workload.build(), workload.data(32)
    for channels in (64,) if arguments.quick else (64, 128, 256):
        workload = Workload("", partial(GPT, width=channels), tokens(), 16, 8)
        sizes[f"3-layer GPT, width {channels}"] = workload.build(), workload.data(8)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, (model, batches) in sizes.items():
        calls["ordinary", name] = _ordinary(model.eval(), batches)
        calls["ewc", name] = _consolidation(model, batches)
    timings = interleave(calls, arguments.rounds)
    rows = [
        [
            name,
            f"{sum(each.numel() for each in model.parameters()) / 1e6:.2f}",
            number(1e3 * timings.median(("ordinary", name)) / len(batches)),
            number(1e3 * timings.median(("ewc", name)) / len(batches)),
            number(timings.ratio(("ewc", name), ("ordinary", name))),
        ]
        for name, (model, batches) in sizes.items()
    ]
    return table(
        [
            "width",
            "million parameters",
            "forward + backward, ms per batch",
            "consolidation, ms per batch",
            "ratio",
        ],
        rows,
    )


def classes(arguments: argparse.Namespace) -> str:
    """Time of the exact Fisher information against the number of classes."""
    sizes: dict[int, tuple[nn.Module, list[Batch]]] = {}
    for count in CLASSES[:2] if arguments.quick else CLASSES:
        model = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, count))
        workload = Workload("", lambda m=model: m, vectors(784), 128, 8)
        batches = [(x, y % count) for x, y in workload.data(8)]
        sizes[count] = model.eval(), batches
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for count, (model, batches) in sizes.items():
        calls["ordinary", count] = _ordinary(model, batches)
        calls["empirical", count] = _consolidation(model, batches)
        calls["exact", count] = _consolidation(model, batches, fisher_type="exact")
    timings = interleave(calls, arguments.rounds)
    rows = [
        [
            str(count),
            number(1e3 * timings.median(("ordinary", count)) / len(batches)),
            number(timings.ratio(("empirical", count), ("ordinary", count))),
            number(timings.ratio(("exact", count), ("ordinary", count))),
            number(timings.ratio(("exact", count), ("ordinary", count)) / count),
        ]
        for count, (_, batches) in sizes.items()
    ]
    head = [
        "MLP 784-400-C, classes C",
        "forward + backward, ms per batch",
        "empirical, times that",
        "exact, times that",
        "exact, for each class",
    ]
    return table(head, rows)


def processes(arguments: argparse.Namespace) -> str:
    """Time against the number of processes, each with as many batches of its own."""
    rows = []
    for count in PROCESSES:
        batches = 2 if arguments.quick else 32
        found: list[tuple[float, float]] = together(count, _timed, batches, arguments.rounds)
        ordinary, consolidation = (statistics.median(each) for each in zip(*found, strict=True))
        ratio = statistics.median(b / a for a, b in found)
        rows.append([str(count), *map(number, (1e3 * ordinary, 1e3 * consolidation, ratio))])
    head = [
        "MLP 784-400-400-10, processes of one thread",
        "forward + backward, ms",
        "consolidation, ms",
        "ratio",
    ]
    return table(head, rows)


def _timed(batches: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds of an ordinary pass and of a consolidation, in each round, on this process."""
    workload = Workload("", mlp, vectors(784), 128, batches)
    model, own = workload.build().eval(), workload.data(batches)
    found = []
    for _ in range(rounds + 1):
        seconds = []
        for run in (_ordinary(model, own), _consolidation(model, own)):
            dist.barrier()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        found.append((seconds[0], seconds[1]))
    return found[1:]


def tasks(arguments: argparse.Namespace) -> str:
    """Time and size of the state against the number of tasks."""
    torch.manual_seed(0)
    workload = Workload("", mlp, vectors(784), 128, 1)
    model, batches = workload.build().eval(), workload.data(1)
    parameters = list(model.parameters())
    states = {}
    growing = EWC(model, Classification())
    for task in range(1, max(TASKS) + 1):
        with torch.no_grad():
            for parameter in parameters:
                parameter += 0.01 * torch.randn_like(parameter)
        growing.consolidate(batches)
        if task in TASKS:
            states[task] = growing.state_dict()
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for count, state in states.items():
        ewc = EWC(model, Classification())
        ewc.load_state_dict(state)
        calls["penalty", count] = partial(_value_and_gradient, ewc, parameters)
        again = EWC(model, Classification())
        again.load_state_dict(state)
        calls["consolidation", count] = partial(again.consolidate, batches)
    timings = interleave(calls, arguments.rounds)
    first = TASKS[0]
    rows = [
        [
            str(count),
            number(1e3 * timings.median(("penalty", count))),
            number(timings.ratio(("penalty", count), ("penalty", first))),
            number(1e3 * timings.median(("consolidation", count))),
            number(timings.ratio(("consolidation", count), ("consolidation", first))),
            number(_bytes(state) / 2**20),
        ]
        for count, state in states.items()
    ]
    return table(
        [
            "MLP 784-400-400-10, tasks so far",
            "penalty and gradient, ms",
            "one task = 1",
            "one more consolidation of 128 samples, ms",
            "one task = 1",
            "state, MiB",
        ],
        rows,
    )


def _ordinary(model: nn.Module, batches: list[Batch]) -> Callable[[], object]:
    return lambda: [gradients(model, batch) for batch in batches]


def _consolidation(model: nn.Module, batches: list[Batch], **options: Any) -> Callable[[], object]:
    return lambda: EWC(model, Classification(), **options).consolidate(batches)


def _value_and_gradient(ewc: EWC, parameters: list[nn.Parameter]) -> object:
    return torch.autograd.grad(ewc(), parameters)


def _bytes(state: object) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(map(_bytes, state.values())) if isinstance(state, dict) else 0


def report(arguments: argparse.Namespace) -> str:
    """Five tables, as Markdown."""
    return "\n\n".join(
        [
            samples(arguments),
            width(arguments),
            classes(arguments),
            tasks(arguments),
            processes(arguments),
            f"{_harness.machine()}. Medians of {arguments.rounds} interleaved rounds; ratios "
            "within a round.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    _harness.main("growth", report, description=__doc__.splitlines()[0], argv=argv)


if __name__ == "__main__":
    main()
