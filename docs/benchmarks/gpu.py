"""Collection and the penalty on an accelerator, at the sizes of GPT-2 small and ResNet-50.

Collection is timed beside an ordinary forward and backward of the same batches, in float32, with
TF32, and under autocast; the penalty beside the bandwidth of a copy, measured in the same run, and
a step of AdamW. `--quick` rehearses everything on the CPU, with small models.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import _harness
import _peers
import torch
from _device import (
    CUDA,
    DEVICE,
    GIB,
    PRECISIONS,
    adamw,
    card,
    clock,
    full_precision,
    peak_and_waits,
)
from _harness import Timings, interleave, number, table
from _large import LARGE, QUICK, prepared
from _models import Batch, Workload, gradients, losses, part
from torch import Tensor, nn

from ewc import EWC, Classification

UNIT, ONE, ALL, ADAMW = "ordinary", "one batch", "all batches", "AdamW step, fused"
COPY, LIMIT, PENALTY = "copy", "read three arrays, write one", "**ewc**"


class Opacus(_peers.Opacus):
    """Tied parameters have one gradient for each use."""

    def __init__(self, model: nn.Module) -> None:
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            raise NotImplementedError("it takes no batch norm")
        super().__init__(model)

    def batch(self, batch: Batch) -> dict[str, Tensor]:
        """The sums of squares of one batch."""
        self._wrapped.zero_grad()
        losses(self._wrapped, batch).sum().backward()
        found = {}
        for name, each in self.parameters.items():
            uses = each.grad_sample
            whole = sum(uses) if isinstance(uses, list) else uses
            found[name] = whole.float().square().sum(0)
        return found


PEERS: list[type[_peers.Contender]] = [_peers.VmapGrad, Opacus]


@dataclass
class Column:
    """What was measured of one model in one precision.

    Attributes:
        timings: Seconds: of the unit and the peers for one batch, of consolidations for all.
        memory: The largest memory beyond model and batches, in bytes, by what ran.
        waits: How often the host waited for the device: for one more batch, and once.
        lines: Where it waited, in a consolidation of all batches, and how often.
        error: How far the Fisher is from one sample at a time in float32, relative.
        methods: How many parameters went by which.
        reasons: Why a peer has no time.
    """

    timings: Timings[str]
    memory: dict[str, float] = field(default_factory=dict)
    waits: tuple[float, float] = (0.0, 0.0)
    lines: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    methods: str = ""
    reasons: dict[str, str] = field(default_factory=dict)


def measure(model: nn.Module, batches: list[Batch], rounds: int) -> Iterator[tuple[str, Column]]:
    """All precisions of one model, one after the other."""
    few = [part(batches[0], 0, 2)]
    oracle = _peers.OneByOne(model)
    oracle.run(few)
    expected = oracle.squares()
    for title, (context, tolerance) in PRECISIONS.items():
        with context():
            column = _column(model, batches, few, expected, tolerance, rounds)
        yield title, column


def _column(
    model: nn.Module,
    batches: list[Batch],
    few: list[Batch],
    expected: dict[str, Tensor],
    tolerance: float,
    rounds: int,
) -> Column:
    def consolidate(some: Sequence[Batch]) -> _peers.Consolidation:
        own = _peers.Consolidation(model)
        own.run(some)
        return own

    first = consolidate(few)
    column = Column(Timings({}), error=_error(first.squares(), expected))
    del first
    ewc = EWC(model, Classification())
    paths = Counter(ewc.consolidate(few).paths.values())
    column.methods = ", ".join(f"{count} {path}" for path, count in paths.items())
    del ewc
    calls: dict[str, Callable[[], object]] = {
        UNIT: partial(gradients, model, batches[0]),
        ONE: partial(consolidate, batches[:1]),
        ALL: partial(consolidate, batches),
    }
    counted: dict[str, Counter[str]] = {}
    for title, call in calls.items():
        call()
        column.memory[title], counted[title] = peak_and_waits(call)
    once, every = (sum(counted[title].values()) for title in (ONE, ALL))
    more = (every - once) / (len(batches) - 1)
    column.waits = more, once - more
    column.lines = dict(counted[ALL].most_common(20))
    for kind in PEERS:
        try:
            peer = _peers.fresh(kind, model)
            peer.run(few)
            error = _error(peer.squares(), expected)
            if not error < tolerance:
                raise ValueError(f"wrong result, off by {100 * error:.0f} %")
            if isinstance(peer, _peers.VmapGrad):
                peer.chunk = min((None, 4), key=partial(_with_chunk, peer, batches[0]))
            run = partial(peer.run, batches[:1])
            column.memory[kind.title], _ = peak_and_waits(run)
            calls[kind.title] = run
        except Exception as reason:  # whatever a peer cannot do is an entry
            column.reasons[kind.title] = _harness.short(reason)
    calls[ADAMW] = adamw(model, {"fused": True})
    column.timings = interleave(calls, rounds, clock=clock)
    return column


def _with_chunk(peer: _peers.VmapGrad, batch: Batch, chunk: int | None) -> float:
    peer.chunk = chunk
    peer.run([batch])
    return clock(lambda: peer.run([batch]), 1)


def _error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The distance to what is right, relative, of all parameters together."""
    wrong = sum(float((found[name] - each).norm()) ** 2 for name, each in expected.items())
    return (wrong / sum(float(each.norm()) ** 2 for each in expected.values())) ** 0.5


def collection_table(workload: Workload, columns: dict[str, Column]) -> str:
    """Times, memory and synchronisations of one model."""
    count = workload.batches
    notes: dict[str, str] = {}
    every = columns.values()

    def more(each: Column) -> float:
        times = each.timings
        return (times.median(ALL) - times.median(ONE)) / (count - 1)

    def unit(each: Column) -> float:
        return each.timings.median(UNIT)

    def memory(title: str) -> list[str]:
        return [number(each.memory[title] / GIB) if title in each.memory else "-" for each in every]

    rows = [
        ["forward + backward, ms per batch", *[number(1e3 * unit(each)) for each in every]],
        ["the same, the unit", *["1" for _ in every]],
        ["**ewc**, one more batch", *[number(more(each) / unit(each)) for each in every]],
        [
            f"**ewc**, a consolidation of {count} batches",
            *[number(each.timings.ratio(ALL, UNIT) / count) for each in every],
        ],
        [
            "**ewc**, a consolidation of one batch",
            *[number(each.timings.ratio(ONE, UNIT)) for each in every],
        ],
    ]
    for title in (*[kind.title for kind in PEERS], ADAMW):
        cells = []
        for each in every:
            if title in each.reasons:
                key = notes.setdefault(each.reasons[title], chr(ord("a") + len(notes)))
                cells.append(f"cannot ({key})")
            else:
                cells.append(number(each.timings.ratio(title, UNIT)))
        rows.append([title, *cells])
    rows += [
        ["memory of forward + backward, GiB", *memory(UNIT)],
        [f"memory of a consolidation of {count} batches, GiB", *memory(ALL)],
        *[[f"memory of {kind.title}, GiB", *memory(kind.title)] for kind in PEERS],
        ["synchronisations for one more batch", *[number(each.waits[0]) for each in every]],
        ["synchronisations once", *[number(each.waits[1]) for each in every]],
        ["error of **ewc**, relative", *[f"{each.error:.1e}" for each in every]],
        ["parameters by method", *[each.methods for each in every]],
    ]
    spread = max(each.timings.spread(UNIT) for each in every)
    return "\n\n".join(
        [
            table([workload.name, *columns], rows),
            *(["\n".join(f"- ({key}) {why}" for why, key in notes.items())] if notes else []),
            f"Times the unit, per batch. {count} batches of {workload.batch_size}; the middle half "
            f"of the rounds is at most {100 * spread:.0f} % wide.",
        ]
    )


def penalty(model: nn.Module, batches: list[Batch], rounds: int) -> tuple[int, Timings[str], int]:
    """The number of entries, the times, and the synchronisations of a call."""
    parameters = list(model.parameters())
    entries = sum(each.numel() for each in parameters)
    ewc = EWC(model, Classification())
    ewc.consolidate([part(batches[0], 0, 2)])
    with torch.no_grad():
        for each in parameters:
            each.mul_(1.001)  # away from the anchor
    first, second, third, out = (torch.randn(entries, device=DEVICE) for _ in range(4))

    def value_and_gradient() -> object:
        return torch.autograd.grad(ewc(), parameters)

    calls: dict[str, Callable[[], object]] = {
        COPY: lambda: out.copy_(first),
        LIMIT: lambda: torch.addcmul(first, second, third, out=out),
        PENALTY: value_and_gradient,
        ADAMW: adamw(model, {"fused": True}),
        "AdamW step, foreach": adamw(model, {"foreach": True}),
    }
    value_and_gradient()
    _, counted = peak_and_waits(value_and_gradient)
    return entries, interleave(calls, rounds, clock=clock), sum(counted.values())


def penalty_table(rows_of: dict[str, tuple[int, Timings[str], int]]) -> str:
    """Times of all models, and shares of what bounds them."""
    rows = []
    for name, (entries, times, counted) in rows_of.items():
        rate = 8 * entries / times.median(COPY)
        for title in times.seconds:
            moved = {COPY: 8 * entries, LIMIT: 16 * entries, PENALTY: 16 * entries}.get(title)
            rows.append(
                [
                    f"{name}, {entries / 1e6:.1f} million: {title}",
                    number(1e3 * times.median(title)),
                    "-" if moved is None else f"{100 * moved / times.median(title) / rate:.0f} %",
                    number(times.ratio(title, ADAMW)),
                    number(counted) if title == PENALTY else "-",
                ]
            )
    head = ["penalty: value and gradient", "ms", "of the copy's bandwidth"]
    rates = "; ".join(
        f"{name} {number(8 * entries / times.median(COPY) / 1e9)} GB/s"
        for name, (entries, times, _) in rows_of.items()
    )
    return (
        table([*head, f"{ADAMW} = 1", "synchronisations"], rows)
        + f"\n\nThe copy moves, read and written: {rates}. A gradient must read three arrays and "
        "write one."
    )


def report(arguments: argparse.Namespace) -> str:
    """The tables, as Markdown."""
    if not CUDA and not arguments.quick:
        raise SystemExit("gpu.py needs an accelerator. Fix: --quick rehearses it on the CPU.")
    full_precision()
    parts: list[str] = []
    found: dict[str, object] = {}
    penalties = {}

    def save(title: str, of: dict[str, object]) -> None:  # at once: a run may be cut short
        found[title] = of
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")

    for workload in QUICK if arguments.quick else LARGE:
        model, batches = prepared(workload)
        penalties[workload.name] = penalty(model, batches, max(9, arguments.rounds))
        save(f"{workload.name}, penalty", penalties[workload.name][1].seconds)
        columns = {}
        for title, column in measure(model, batches, arguments.rounds):
            columns[title] = column
            save(f"{workload.name}, {title}", {**vars(column), "timings": column.timings.seconds})
        parts.append(collection_table(workload, columns))
        del model, batches, column
        if CUDA:
            gc.collect()
            torch.cuda.empty_cache()
    parts.append(penalty_table(penalties))
    parts.append(f"{card()} Medians of {arguments.rounds} interleaved rounds.")
    return "\n\n".join(parts)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="also write all times there, in seconds")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    _harness.main(
        "gpu",
        report,
        description=__doc__.splitlines()[0],
        rounds=5,
        options=_options,
        argv=argv,
    )


if __name__ == "__main__":
    main()
