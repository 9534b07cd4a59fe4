"""What a consolidation costs once, and what one more batch costs.

The unit is an ordinary forward and backward of one batch. A first consolidation verifies its
methods; a further one of the same object does so only if something has changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import _harness
import torch
from _harness import interleave, number, table
from _models import WORKLOADS, Workload, gradients

from ewc import EWC, Classification, OnlineEWC

UNIT, FIRST, FURTHER, FEW, MANY = "ordinary", "first", "further", "few", "many"
FEW_ALONE, MANY_ALONE = "few, one by one", "many, one by one"


def measure(workload: Workload, arguments: argparse.Namespace) -> list[str]:
    """A column: milliseconds of the unit, then multiples of it."""
    torch.manual_seed(0)
    model = workload.build().eval()
    few, many = (1, 4) if arguments.quick else (workload.batches // 4, workload.batches)
    batches = workload.data(many)
    further = OnlineEWC(model, Classification(), decay=0.9)

    def first(count: int) -> Callable[[], object]:
        return lambda: EWC(model, Classification()).consolidate(batches[:count])

    def alone(count: int) -> Callable[[], object]:
        """A generator's batches are not run together."""
        return lambda: EWC(model, Classification()).consolidate(iter(batches[:count]))

    calls: dict[str, Callable[[], object]] = {
        UNIT: lambda: gradients(model, batches[0]),
        FIRST: first(1),
        FURTHER: lambda: further.consolidate(batches[:1]),
        FEW: first(few),
        MANY: first(many),
        FEW_ALONE: alone(few),
        MANY_ALONE: alone(many),
    }
    timings = interleave(calls, arguments.rounds)

    def more(less: str, all_: str) -> str:
        return number((timings.ratio(all_, UNIT) - timings.ratio(less, UNIT)) / (many - few))

    return [
        number(1e3 * timings.median(UNIT)),
        number(timings.ratio(FIRST, UNIT)),
        number(timings.ratio(FURTHER, UNIT)),
        more(FEW_ALONE, MANY_ALONE),
        more(FEW, MANY),
    ]


def report(arguments: argparse.Namespace) -> str:
    """The table, as Markdown."""
    columns, absent = {}, []
    for workload in WORKLOADS:
        try:
            columns[workload.name] = measure(workload, arguments)
        except ModuleNotFoundError as reason:
            absent.append(f"{workload.name}: {reason}.")
    titles = [
        "forward + backward of one batch, ms",
        "a first consolidation of one batch",
        "a further one of the same object",
        "one more batch of a generator, which is run by itself",
        "one more batch of a list, run together with others if it is small",
    ]
    rows = [list(row) for row in zip(titles, *columns.values(), strict=True)]
    return "\n\n".join(
        [
            table(["forward + backward = 1", *columns], rows),
            *absent,
            f"{_harness.machine('transformers')}. Medians of the ratios of {arguments.rounds} "
            "interleaved rounds. *One more batch*: the difference between a pass over all batches "
            "of [collection](#collection) and one over a quarter of them, for each batch.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    _harness.main("one_batch", report, description=__doc__.splitlines()[0], argv=argv)


if __name__ == "__main__":
    main()
