"""Collection and the penalty on an accelerator, at the sizes of GPT-2 small and ResNet-50.

Collection is timed beside an ordinary forward and backward of the same batches, in float32, with
TF32, and under autocast; the penalty beside the bandwidth of a copy, measured in the same run, and
a step of AdamW. `--seconds` bounds the run: every column has an equal share. `--quick` rehearses
everything on the CPU, with small models.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import _harness
import _peers
import torch
from _device import (
    CUDA,
    DEVICE,
    PRECISIONS,
    adamw,
    card,
    clock,
    full_precision,
    peak_and_waits,
)
from _device_tables import (
    ADAMW,
    ALL,
    COPY,
    LIMIT,
    ONE,
    PENALTY,
    UNIT,
    Column,
    collection_table,
    penalty_table,
)
from _harness import ALONE, Timings, autograd_alone, interleave
from _large import LARGE, QUICK, prepared
from _models import Batch, Workload, gradients, losses, part
from torch import Tensor, nn

from ewc import EWC, Classification


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


def measure(
    model: nn.Module, batches: list[Batch], rounds: int, deadlines: Sequence[float]
) -> Iterator[tuple[str, Column]]:
    """All precisions of one model, one after the other, each until its deadline."""
    few = [part(batches[0], 0, 2)]
    oracle = _peers.OneByOne(model)
    oracle.run(few)
    expected = oracle.squares()
    for (title, (context, tolerance)), deadline in zip(PRECISIONS.items(), deadlines, strict=True):
        with context():
            column = _column(model, batches, few, expected, tolerance, rounds, deadline)
        yield title, column


def _column(
    model: nn.Module,
    batches: list[Batch],
    few: list[Batch],
    expected: dict[str, Tensor],
    tolerance: float,
    rounds: int,
    deadline: float,
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
        if time.perf_counter() > deadline:
            column.reasons[kind.title] = "not measured: no time was left"
            continue
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
    left = deadline - time.perf_counter()
    column.timings = interleave(calls, rounds, clock=clock, seconds=left)
    return column


def _with_chunk(peer: _peers.VmapGrad, batch: Batch, chunk: int | None) -> float:
    peer.chunk = chunk
    peer.run([batch])
    return clock(lambda: peer.run([batch]), 1)


def _error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The distance to what is right, relative, of all parameters together."""
    wrong = sum(float((found[name] - each).norm()) ** 2 for name, each in expected.items())
    return (wrong / sum(float(each.norm()) ** 2 for each in expected.values())) ** 0.5


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
        ALONE: lambda: torch.autograd.grad(autograd_alone(parameters), parameters),
        PENALTY: value_and_gradient,
        ADAMW: adamw(model, {"fused": True}),
        "AdamW step, foreach": adamw(model, {"foreach": True}),
    }
    value_and_gradient()
    _, counted = peak_and_waits(value_and_gradient)
    return entries, interleave(calls, rounds, clock=clock), sum(counted.values())


def page(
    measured: list[tuple[Workload, dict[str, Column]]],
    penalties: dict[str, tuple[int, Timings[str], int]],
) -> str:
    """The tables of what has been measured so far, as Markdown."""
    peers = [kind.title for kind in PEERS]
    tables = [collection_table(workload, columns, peers) for workload, columns in measured]
    return "\n\n".join([*tables, penalty_table(penalties), card()])


def report(arguments: argparse.Namespace) -> str:
    """The tables, as Markdown."""
    if not CUDA and not arguments.quick:
        raise SystemExit("gpu.py needs an accelerator. Fix: --quick rehearses it on the CPU.")
    full_precision()
    workloads = QUICK if arguments.quick else LARGE
    share = arguments.seconds / (len(workloads) * len(PRECISIONS))
    deadlines = [
        time.perf_counter() + share * (index + 1)
        for index in range(len(workloads) * len(PRECISIONS))
    ]
    measured: list[tuple[Workload, dict[str, Column]]] = []
    penalties: dict[str, tuple[int, Timings[str], int]] = {}
    found: dict[str, object] = {}

    def save(title: str, of: dict[str, object]) -> None:  # at once: a run may be cut short
        found[title] = of
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
            text = page([each for each in measured if each[1]], penalties)
            arguments.json.with_suffix(".md").write_text(text, encoding="utf-8")

    for index, workload in enumerate(workloads):
        model, batches = prepared(workload)
        penalties[workload.name] = penalty(model, batches, max(9, arguments.rounds))
        save(f"{workload.name}, penalty", penalties[workload.name][1].seconds)
        columns: dict[str, Column] = {}
        measured.append((workload, columns))
        until = deadlines[index * len(PRECISIONS) :][: len(PRECISIONS)]
        for title, column in measure(model, batches, arguments.rounds, until):
            columns[title] = column
            save(f"{workload.name}, {title}", {**vars(column), "timings": column.timings.seconds})
        del model, batches, column
        if CUDA:
            gc.collect()
            torch.cuda.empty_cache()
    return page(measured, penalties)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        type=Path,
        help="also write all times there, in seconds, and the tables beside it, as they come",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=150.0,
        help="the time after which no peer and no round begins (default: 150)",
    )


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
