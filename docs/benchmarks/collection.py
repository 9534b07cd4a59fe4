"""Collection of the Fisher information, beside an ordinary pass and beside other libraries.

The unit is an ordinary forward and backward of the same batches: `torch.autograd.grad` of the mean
loss. Every contender's result is compared with one sample at a time before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import _harness
import _peers
import torch
from _harness import Timings, interleave, number, table
from _models import WORKLOADS, Batch, Workload, gradients, part
from torch import Tensor

UNIT = "ordinary"
TOLERANCE = 1e-2
BUDGET = 0.4
"""Seconds for which a slow contender runs in each round: fewer batches, down to one."""


@dataclass
class Result:
    """What came of one model.

    Attributes:
        workload: Which.
        timings: Seconds per batch, of the unit and of those that gave the right result.
        reasons: Why the others did not, by contender's title.
    """

    workload: Workload
    timings: Timings[str]
    reasons: dict[str, str]


def measure(workload: Workload, arguments: argparse.Namespace) -> Result:
    """Check, then time all contenders on one model."""
    torch.manual_seed(0)
    model = workload.build().eval()
    batches = workload.data(4 if arguments.quick else workload.batches)
    few = [part(batch, 0, 4) for batch in batches[:2]]
    oracle = _peers.fresh(_peers.OneByOne, model.double())
    oracle.run(_double(few))
    expected = {name: each.float() for name, each in oracle.squares().items()}
    model.float()

    runs: dict[str, int] = {UNIT: len(batches)}
    calls: dict[str, Callable[[], object]] = {
        UNIT: lambda: [gradients(model, batch) for batch in batches]
    }
    reasons: dict[str, str] = {}
    for kind in _peers.OWN if arguments.no_peers else _peers.CONTENDERS:
        try:
            contender = _peers.fresh(kind, model)
            contender.run(few)
            error = _error(contender.squares(), expected)
        except Exception as reason:  # whatever a peer cannot do is an entry
            reasons[kind.title] = _harness.short(reason)
            continue
        if not error < TOLERANCE:
            reasons[kind.title] = f"wrong result, off by {100 * error:.0f} %"
            continue
        if isinstance(contender, _peers.VmapGrad):
            contender.tune(batches[:1])
        some = batches if kind is _peers.Consolidation else _affordable(contender, batches)
        runs[kind.title] = len(some)
        calls[kind.title] = partial(contender.run, some)
    return Result(workload, interleave(calls, arguments.rounds, runs=runs), reasons)


def _double(batches: Sequence[Batch]) -> list[Batch]:
    """The same batches, their real numbers in double precision."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return [
        {name: wide(each) for name, each in batch.items()}
        if isinstance(batch, dict)
        else (wide(batch[0]), batch[1])
        for batch in batches
    ]


def _error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The distance to what is right, relative: the largest of all parameters that count."""
    largest = max(float(each.norm()) for each in expected.values())
    return max(
        float((found[name] - right).norm()) / max(float(right.norm()), 1e-6 * largest)
        for name, right in expected.items()
    )


def _affordable(contender: _peers.Contender, batches: list[Batch]) -> list[Batch]:
    """As many batches as a slow contender has time for."""
    count = int(BUDGET / _peers.seconds(contender, batches[:1]))
    return batches[: max(1, min(len(batches), count))]


def report(arguments: argparse.Namespace) -> str:
    """The table, as Markdown."""
    chosen = [w for w in WORKLOADS if not arguments.models or _named(w, arguments.models)]
    results, absent = [], []
    for workload in chosen:
        try:
            results.append(measure(workload, arguments))
        except ModuleNotFoundError as reason:  # only a model's own library: peers' are entries
            absent.append(f"{workload.name}: {reason}.")
    notes: dict[str, str] = {}
    rows = [
        ["forward + backward, ms per batch"]
        + [number(1e3 * each.timings.median(UNIT)) for each in results],
        ["the same, the unit"] + ["1" for _ in results],
    ]
    for kind in _peers.OWN if arguments.no_peers else _peers.CONTENDERS:
        rows.append([kind.title] + [_entry(each, kind.title, notes) for each in results])
    spread = max(each.timings.spread(UNIT) for each in results)
    shapes = "; ".join(
        f"{each.workload.name}: {4 if arguments.quick else each.workload.batches} batches of "
        f"{each.workload.batch_size}"
        for each in results
    )
    return "\n\n".join(
        [
            table(["times the unit", *(each.workload.name for each in results)], rows),
            *(["\n".join(f"- ({key}) {why}" for why, key in notes.items())] if notes else []),
            *absent,
            f"{_harness.machine(*_peers.DISTRIBUTIONS)}. {shapes}. Medians of the ratios of "
            f"{arguments.rounds} interleaved rounds; the middle half of the rounds is at most "
            f"{100 * spread:.0f} % wide.",
        ]
    )


def _named(workload: Workload, names: Sequence[str]) -> bool:
    return any(name.lower() in workload.name.lower() for name in names)


def _entry(result: Result, title: str, notes: dict[str, str]) -> str:
    if title not in result.reasons:
        return number(result.timings.ratio(title, UNIT))
    key = notes.setdefault(result.reasons[title], chr(ord("a") + len(notes)))
    return f"cannot ({key})"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="*", default=[], help="only those named so, in part")
    parser.add_argument("--no-peers", action="store_true", help="without other libraries")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    _harness.main(
        "collection", report, description=__doc__.splitlines()[0], options=_options, argv=argv
    )


if __name__ == "__main__":
    main()
