"""The tables of `gpu.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from _device import GIB
from _harness import Timings, number, table
from _models import Workload

UNIT, ONE, ALL, ADAMW = "ordinary", "one batch", "all batches", "AdamW step, fused"
COPY, LIMIT, PENALTY = "copy", "read three arrays, write one", "**ewc**"


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


def collection_table(workload: Workload, columns: dict[str, Column], peers: Sequence[str]) -> str:
    """Times, memory and synchronisations of one model; `peers` are the titles of the others."""
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
    for title in (*peers, ADAMW):
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
        *[[f"memory of {title}, GiB", *memory(title)] for title in peers],
        ["synchronisations for one more batch", *[number(each.waits[0]) for each in every]],
        ["synchronisations once", *[number(each.waits[1]) for each in every]],
        ["error of **ewc**, relative", *[f"{each.error:.1e}" for each in every]],
        ["parameters by method", *[each.methods for each in every]],
    ]
    spread = max(each.timings.spread(UNIT) for each in every)
    rounds = min(len(each.timings.seconds[UNIT]) for each in every)
    return "\n\n".join(
        [
            table([workload.name, *columns], rows),
            *(["\n".join(f"- ({key}) {why}" for why, key in notes.items())] if notes else []),
            f"Times the unit, per batch. {count} batches of {workload.batch_size}. Medians of "
            f"{rounds} interleaved rounds or more, whose middle half is at most "
            f"{100 * spread:.0f} % wide.",
        ]
    )


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
