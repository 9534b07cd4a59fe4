"""What a consolidation reports.

The step size that training tolerates is bounded by the largest curvature of the penalty, a layer
that fell back to a slower path costs time, and a layer that holds nearly all of the curvature is
nearly all that is protected: all are visible only here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ewc._checks import positive_int
from ewc._options import Method
from ewc.processes.layout import Groups, local, shard_groups
from ewc.processes.reductions import max_over, sum_over

_PATHS: dict[Method, str] = {
    "rule": "closed form",
    "vmap": "per-sample gradients",
    "loop": "one sample at a time, slow",
    "unused": "no gradient",
}
_SHOWN = 6
ROWS = 40


class Curvature(NamedTuple):
    """The curvature that the penalty has for a parameter, or for several, before `strength`.

    Attributes:
        entries: How many entries there are.
        trace: Their sum.
        largest: The largest of them.
    """

    entries: int
    trace: float
    largest: float

    @property
    def mean(self) -> float:
        """The mean over the entries, 0 if there are none."""
        return self.trace / self.entries if self.entries else 0.0


@dataclass(frozen=True, repr=False)
class Summary:
    """One consolidation, and the curvature that the penalty has after it.

    The curvature is that of the whole quadratic that is penalised from now on, all tasks together
    (`OnlineEWC`: `decay * F~ + prior_precision`), before `strength`: this is what bounds the step.
    Plain gradient descent on the penalty is stable for `lr * strength * largest < 2`.

    `repr(summary)` is a few lines; `print(summary)` adds a `table` of the parameters.

    Attributes:
        n_tasks: How many tasks have been consolidated, this one included.
        samples: Samples of this consolidation, over all processes.
        parameters: The curvature of each protected parameter, with `entries`, `trace`, `largest`
            and `mean`.
        paths: How the Fisher of each parameter of this consolidation was computed: `"rule"` (in
            closed form), `"vmap"` (from per-sample gradients), `"loop"` (one sample at a time), or
            `"unused"` (nothing reached the parameter).
        reasons: Why the parameters that went one sample at a time did so.
    """

    n_tasks: int
    samples: int
    parameters: Mapping[str, Curvature]
    paths: Mapping[str, Method]
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def trace(self) -> float:
        """Sum of the curvature over all protected entries."""
        return together(self.parameters.values()).trace

    @property
    def largest(self) -> float:
        """Largest entry of the curvature."""
        return together(self.parameters.values()).largest

    @property
    def bound(self) -> float:
        """What `lr * strength` must stay below in plain gradient descent.

        Example:
            >>> ewc = EWC(model, Classification())
            >>> summary = ewc.consolidate(tasks[0])
            >>> summary.bound == 2 / summary.largest
            True
        """
        return 2.0 / self.largest if self.largest > 0 else float("inf")

    def __repr__(self) -> str:
        lines = self._head()
        groups: dict[tuple[Method, str], list[str]] = {}
        for name, path in self.paths.items():
            groups.setdefault((path, self.reasons.get(name, "")), []).append(name)
        for (path, reason), names in groups.items():
            shown = ", ".join(names[:_SHOWN])
            more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
            lines.append(f"  {path} ({_PATHS[path]}): {shown}{more}")
            if reason:
                lines.append(f"    because {reason}")
        return "\n".join(lines)

    def __str__(self) -> str:
        because = [f"  loop because {reason}" for reason in dict.fromkeys(self.reasons.values())]
        return "\n".join([*self._head(), self.table(), *because])

    def table(self, rows: int = ROWS) -> str:
        """The curvature of each parameter or, where there are too many, of each layer, as text.

        A layer is named by as much of the names as fits into `rows`; rows that are still too many
        give way, those with the least curvature first, to one that sums them up. `trace` is the
        share of the whole; the path is `earlier` for what only earlier tasks have collected.

        Args:
            rows: At most so many rows, `>= 1`, next to the head and the sum of all.
        """
        groups = fold(self.parameters, rows)
        whole = together(self.parameters.values())

        def row(label: str, one: Curvature, names: list[str]) -> tuple[str, ...]:
            share = one.trace / whole.trace if whole.trace else 0.0
            paths = dict.fromkeys(self.paths.get(name, "earlier") for name in names)
            numbers = (f"{one.entries:,}", f"{share:.1%}", f"{one.mean:.3g}", f"{one.largest:.3g}")
            return (label, *numbers, ", ".join(paths))

        cells: list[tuple[str, ...]] = [("", "entries", "trace", "mean", "largest", "path")]
        for label, names in groups.items():
            cells.append(row(label, together(self.parameters[name] for name in names), names))
        cells.append(row("all", whole, []))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for label, *numbers, path in cells:
            aligned = [f"{one:>{width}}" for one, width in zip(numbers, widths[1:], strict=False)]
            lines.append("  ".join(["", f"{label:{widths[0]}}", *aligned, path]).rstrip())
        return "\n".join(lines)

    def _head(self) -> list[str]:
        return [
            f"Task {self.n_tasks}: {self.samples} samples, trace {self.trace:.4g}, "
            f"largest entry {self.largest:.4g}",
            f"  stable steps: lr * strength < {self.bound:.4g}",
        ]


def together(curvatures: Iterable[Curvature]) -> Curvature:
    """The curvature of several parameters."""
    entries, trace, largest = 0, 0.0, 0.0
    for one in curvatures:
        entries += one.entries
        trace += one.trace
        largest = max(largest, one.largest)
    return Curvature(entries, trace, largest)


def fold(curvatures: Mapping[str, Curvature], rows: int) -> dict[str, list[str]]:
    """At most so many groups of parameters: by layer, named as finely as fits.

    Args:
        curvatures: By name of the parameter.
        rows: The most groups, `>= 1`.

    Returns:
        The names in each group, by what they have in common: `"h.0"` for `"h.0.fc.weight"`. If
        there are too many groups even so, the last one holds those with the least curvature.
    """
    rows = positive_int("rows", rows)
    groups: dict[str, list[str]] = {}
    for depth in range(max((name.count(".") for name in curvatures), default=0) + 1, 0, -1):
        groups = {}
        for name in curvatures:
            groups.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        if len(groups) <= rows:
            return groups
    trace = {
        label: together(curvatures[name] for name in names).trace for label, names in groups.items()
    }
    shown = set(sorted(groups, key=trace.__getitem__, reverse=True)[: rows - 1])
    others = [name for label, names in groups.items() if label not in shown for name in names]
    kept = {label: names for label, names in groups.items() if label in shown}
    return {**kept, f"{len(groups) - len(kept)} others": others}


def measure(curvatures: Mapping[str, Tensor]) -> dict[str, Curvature]:
    """Sums and largest entries of tensors, read at once: each reading waits for a device.

    Args:
        curvatures: Real tensors, by name. A collective, if some are sharded.
    """
    spread: dict[Groups, list[str]] = {}
    for name, tensor in curvatures.items():
        spread.setdefault(shard_groups(tensor), []).append(name)
    found = {}
    for groups, names in spread.items():
        parts = [local(curvatures[name]) for name in names]
        tops = [part.max() if part.numel() else part.new_zeros(()) for part in parts]
        device = parts[0].device
        sums = sum_over(torch.stack([part.sum().to(device) for part in parts]), groups)
        largest = max_over(torch.stack([top.to(device) for top in tops]), groups)
        read = torch.stack([sums, largest]).tolist()
        for name, trace, top in zip(names, *read, strict=True):
            found[name] = Curvature(curvatures[name].numel(), trace, top)
    return {name: found[name] for name in curvatures}
