"""What a consolidation costs once, what that is spent on, and what one more batch costs.

The unit is an ordinary forward and backward of one batch. A first consolidation verifies its
methods; a further one of the same object does so only if something has changed. Beside each time
stand two others: that of its operations of PyTorch as straight code, and that of its runs of the
model by PyTorch alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import _harness
import _peers
import torch
from _harness import interleave, number, table
from _models import WORKLOADS, Batch, Workload, gradients, outputs, part
from _replay import replay
from torch import nn

from ewc import EWC, Classification, OnlineEWC
from ewc._consolidation import Estimate
from ewc.fisher import collection
from ewc.fisher.accumulation import Accumulator
from ewc.fisher.batches import Bundle

UNIT, FIRST, FURTHER, FEW, MANY = "ordinary", "first", "further", "few", "many"
FEW_ALONE, MANY_ALONE = "few, one by one", "many, one by one"
FIRST_RUNS, FURTHER_RUNS = "runs of a first", "runs of a further"
FIRST_OPERATIONS, FURTHER_OPERATIONS = "operations of a first", "operations of a further"
OPERATIONS, VMAP_GRAD = "operations of a batch", "vmap(grad)"

PARTS: dict[str, tuple[Any, str]] = {
    "the verification of the methods": (collection, "verify"),
    "two samples, to see whether they are independent": (collection, "check_independence"),
    "the batch": (Accumulator, "add"),
    "the search for changes": (collection, "reachable"),
    "the merge with earlier tasks": (Estimate, "merged_into"),
}
"""The parts of a consolidation, and the functions that do them."""


def runs_of_a_first(model: nn.Module, batch: Batch) -> None:
    """The runs of a first consolidation, by PyTorch alone.

    Two samples together, each of them by itself with its gradient, both at once with their
    gradients, and the batch.
    """
    pair = part(batch, 0, 2)
    outputs(model, pair)
    for sample in (part(batch, 0, 1), part(batch, 1, 2), pair, batch):
        gradients(model, sample)


def runs_of_a_further(model: nn.Module, batch: Batch) -> None:
    """The runs of a further consolidation, by PyTorch alone.

    Two samples together and each by itself, and the batch.
    """
    for start, stop in ((0, 2), (0, 1), (1, 2)):
        outputs(model, part(batch, start, stop))
    gradients(model, batch)


def operations_of_a_batch(consolidate: Callable[[], object]) -> Callable[[], None]:
    """The operations of one batch of a consolidation, without the verification of its methods."""
    found: list[Callable[[], None]] = []
    add = Accumulator.add

    def record(self: Accumulator, bundle: Bundle) -> None:
        found.append(replay(lambda: add(self, bundle)))

    with patch.object(Accumulator, "add", record):
        consolidate()
    return found[0]


def _timed(title: str, call: Callable[..., Any], seconds: dict[str, float]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[title] += time.perf_counter() - begin

    return run


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add the seconds that each part takes inside the context."""
    patches = [
        patch.object(owner, name, _timed(title, getattr(owner, name), seconds))
        for title, (owner, name) in PARTS.items()
    ]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def parts(consolidate: Callable[[], object], rounds: int) -> dict[str, float]:
    """The median seconds of each part, and of the rest."""
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        seconds = dict.fromkeys(PARTS, 0.0)
        begin = time.perf_counter()
        with timed(seconds):
            consolidate()
        seconds["the rest"] = time.perf_counter() - begin - sum(seconds.values())
        found.append(seconds)
    return {title: median(each[title] for each in found) for title in found[0]}


def measure(workload: Workload, arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """A column of each table: milliseconds of the unit, then multiples of it."""
    torch.manual_seed(0)
    model = workload.build().eval()
    few, many = (1, 4) if arguments.quick else (workload.batches // 4, workload.batches)
    batches = workload.data(many)
    average = OnlineEWC(model, Classification(), decay=0.9)

    def first(count: int) -> Callable[[], object]:
        return lambda: EWC(model, Classification()).consolidate(batches[:count])

    def further() -> object:
        return average.consolidate(batches[:1])

    def alone(count: int) -> Callable[[], object]:
        """A generator's batches are not run together."""
        return lambda: EWC(model, Classification()).consolidate(iter(batches[:count]))

    further()
    peer = _peers.fresh(_peers.VmapGrad, model)
    peer.tune(batches[:1])
    calls: dict[str, Callable[[], object]] = {
        UNIT: lambda: gradients(model, batches[0]),
        FIRST: first(1),
        FURTHER: further,
        FIRST_OPERATIONS: replay(first(1)),
        FURTHER_OPERATIONS: replay(further),
        OPERATIONS: operations_of_a_batch(first(1)),
        FIRST_RUNS: lambda: runs_of_a_first(model, batches[0]),
        FURTHER_RUNS: lambda: runs_of_a_further(model, batches[0]),
        FEW: first(few),
        MANY: first(many),
        FEW_ALONE: alone(few),
        MANY_ALONE: alone(many),
        VMAP_GRAD: lambda: peer.run(batches[:1]),
    }
    timings = interleave(calls, arguments.rounds)

    def more(less: str, all_: str) -> str:
        return number((timings.ratio(all_, UNIT) - timings.ratio(less, UNIT)) / (many - few))

    unit = timings.median(UNIT)
    spent = [
        number(each / unit)
        for consolidate in (first(1), further)
        for each in parts(consolidate, max(3, 3 * arguments.rounds)).values()
    ]
    costs = [
        number(1e3 * unit),
        *(number(timings.ratio(call, UNIT)) for call in (FIRST, FIRST_OPERATIONS, FIRST_RUNS)),
        *(
            number(timings.ratio(call, UNIT))
            for call in (FURTHER, FURTHER_OPERATIONS, FURTHER_RUNS)
        ),
        more(FEW_ALONE, MANY_ALONE),
        number(timings.ratio(OPERATIONS, UNIT)),
        number(timings.ratio(VMAP_GRAD, UNIT)),
        more(FEW, MANY),
    ]
    return costs, spent


def report(arguments: argparse.Namespace) -> str:
    """The table, as Markdown."""
    columns, absent = {}, []
    for workload in WORKLOADS:
        try:
            columns[workload.name] = measure(workload, arguments)
        except ModuleNotFoundError as reason:
            absent.append(f"{workload.name}: {reason}.")
    costs = [
        "forward + backward of one batch, ms",
        "a first consolidation of one batch",
        "its operations alone",
        "its runs by PyTorch alone",
        "a further one of the same object",
        "its operations alone",
        "its runs by PyTorch alone",
        "one more batch of a generator, which is run by itself",
        "its operations alone",
        "the same batch by `vmap(grad)`",
        "one more batch of a list, run together with others if it is small",
    ]
    spent = [f"{which}: {each}" for which in (FIRST, FURTHER) for each in (*PARTS, "the rest")]
    rows = zip(spent, *(column for _, column in columns.values()), strict=True)
    return "\n\n".join(
        [
            table(
                ["forward + backward = 1", *columns],
                [
                    list(row)
                    for row in zip(costs, *(column for column, _ in columns.values()), strict=True)
                ],
            ),
            "What a consolidation of one batch is spent on:",
            table(
                ["forward + backward = 1", *columns],
                [list(row) for row in rows if any(float(each) > 0 for each in row[1:])],
            ),
            *absent,
            f"{_harness.machine('transformers')}. Medians of the ratios of {arguments.rounds} "
            "interleaved rounds. *One more batch*: the difference between a pass over all batches "
            "of [collection](#collection) and one over a quarter of them, for each batch. *Its "
            "operations alone*: the same operations of PyTorch on tensors of the same shapes, one "
            "after the other as straight code, without the Python of the library and the model, "
            "`vmap` and autograd. *Its runs by PyTorch alone*: the model on the same samples, as "
            "often, with ordinary gradients.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    _harness.main("one_batch", report, description=__doc__.splitlines()[0], argv=argv)


if __name__ == "__main__":
    main()
