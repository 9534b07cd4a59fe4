"""What a consolidation reports.

The largest curvature of the penalty bounds the learning rate. A layer that fell back to a slower
method costs time. Where one layer has nearly all of the curvature, little else is protected. A user
can see these facts only here.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ewc._checks import listed, listed_names, positive_int
from ewc._options import Method
from ewc._scalars import largest_entry
from ewc.processes.layout import Groups, local, shard_groups
from ewc.processes.reductions import max_over, sum_over

_NAMES = 6
ROWS = 20
"""The most rows of a table, unless the caller says otherwise."""


class Curvature(NamedTuple):
    """The curvature of the penalty in one parameter or several, before `strength`.

    Attributes:
        entries: The number of entries.
        trace: The sum of the curvature over them.
        largest: The largest curvature of an entry.

    Example:
        >>> Curvature(entries=4, trace=2.0, largest=1.5).mean
        0.5
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
    """The report of a consolidation, and the curvature of the penalty after it.

    The curvature is that of the penalty of all tasks, before `strength`. `EWC` sums the Fisher
    information of all tasks; `OnlineEWC` takes `decay * F~ + prior_precision`. Gradient descent on
    the penalty is stable for `lr * strength * largest < 2 * (1 + momentum)`.

    `print(summary)` and `repr(summary)` give the same text: totals, advice on the strength, a
    `table` of at most 20 rows, and the reasons for slow methods.

    Attributes:
        n_tasks: The number of tasks consolidated, this one included.
        samples: The number of samples of this consolidation, over all processes.
        parameters: The curvature of each protected parameter, by canonical name.
        paths: The method that computed the Fisher of each parameter of this consolidation:
            `"rule"` (in closed form), `"vmap"` (from per-sample gradients), `"loop"` (one sample at
            a time), or `"unused"` (no gradient reached the parameter).
        reasons: Why parameters were computed by `"loop"`, by canonical name.
        weight: The factor of the Fisher information of this consolidation.
        strength: lambda, the number in use after this consolidation.
        automatic: Whether `strength` is that of `strength="auto"`.

    Example:
        >>> summary = EWC(model, Classification()).consolidate(tasks[0])
        >>> summary.n_tasks, summary.samples
        (1, 20)
        >>> summary.paths["weight"]
        'rule'
        >>> summary.parameters["weight"].entries
        20
    """

    n_tasks: int
    samples: int
    parameters: Mapping[str, Curvature]
    paths: Mapping[str, Method]
    strength: float
    reasons: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    automatic: bool = False

    @property
    def trace(self) -> float:
        """Sum of the curvature over all protected entries."""
        return combined(self.parameters.values()).trace

    @property
    def largest(self) -> float:
        """Largest entry of the curvature."""
        return combined(self.parameters.values()).largest

    @property
    def bound(self) -> float:
        """The value that `lr * strength` must stay below in plain gradient descent.

        Example:
            >>> regularizer = EWC(model, Classification())
            >>> summary = regularizer.consolidate(tasks[0])
            >>> summary.bound == 2 / summary.largest
            True
        """
        return 2.0 / self.largest if self.largest > 0 else float("inf")

    def __repr__(self) -> str:
        weight = "" if self.weight == 1 else f"weight {self.weight:.4g}, "
        head = (
            f"Task {self.n_tasks}: {self.samples} samples, {weight}trace {self.trace:.4g}, "
            f"largest entry {self.largest:.4g}"
        )
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(name)
        slow = [
            f"  loop: {listed(names, most=_NAMES)}, because {reason}"
            for reason, names in by_reason.items()
        ]
        return "\n".join([head, *self._meaning(), self.table(), *slow])

    def _meaning(self) -> list[str]:
        """What the strength means for training, in words."""
        name = f"strength {self.strength:.4g}{' (auto)' if self.automatic else ''}"
        if not self.strength * self.largest:
            return [f"  {name}: the penalty is 0"]
        limit = self.bound / self.strength
        return [
            f"  {name}: SGD is stable for lr < {limit:.3g}, with momentum 0.9 for "
            f"lr < {1.9 * limit:.3g}",
            f"  if earlier tasks are forgotten, try {2 * self.strength:.3g} (with Adam up to "
            f"{20 * self.strength:.3g})",
            f"  if the current task is hardly learned, try {0.4 * self.strength:.3g}",
        ]

    def table(self, rows: int = ROWS) -> str:
        """A table of the curvature of each parameter or, if there are too many, of each layer.

        The name of a layer is the common beginning of its parameters' names. If there are still too
        many layers, those with the least trace share one row. The column `trace` is the share of
        the total. A parameter that only earlier tasks have estimated has the path `earlier`.

        Args:
            rows: The largest number of rows, `>= 1`, without the header and the row `all`.

        Raises:
            TypeError: `rows` is not an integer.
            ValueError: `rows` is less than 1.
        """
        groups = group_by_layer(self.parameters, rows)
        whole = combined(self.parameters.values())

        def row(label: str, one: Curvature, names: list[str]) -> tuple[str, ...]:
            share = one.trace / whole.trace if whole.trace else 0.0
            paths = dict.fromkeys(self.paths.get(name, "earlier") for name in names)
            numbers = (f"{one.entries:,}", f"{share:.1%}", f"{one.mean:.3g}", f"{one.largest:.3g}")
            return (label, *numbers, ", ".join(paths))

        cells: list[tuple[str, ...]] = [("", "entries", "trace", "mean", "largest", "path")]
        for label, names in groups.items():
            cells.append(row(label, combined(self.parameters[name] for name in names), names))
        cells.append(row("all", whole, []))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for label, *numbers, path in cells:
            aligned = [f"{one:>{width}}" for one, width in zip(numbers, widths[1:], strict=False)]
            lines.append("  ".join(["", f"{label:{widths[0]}}", *aligned, path]).rstrip())
        return "\n".join(lines)


def combined(curvatures: Iterable[Curvature]) -> Curvature:
    """The curvature of several parameters as of one."""
    entries, trace, largest = 0, 0.0, 0.0
    for one in curvatures:
        entries += one.entries
        trace += one.trace
        largest = max(largest, one.largest)
    return Curvature(entries, trace, largest)


def group_by_layer(curvatures: Mapping[str, Curvature], rows: int) -> dict[str, list[str]]:
    """Parameters in at most `rows` groups, by layer, with names as specific as that allows.

    Args:
        curvatures: By name of the parameter.
        rows: The most groups, `>= 1`.

    Returns:
        The parameters' names in each group, by their common beginning: `"h.0"` for
        `"h.0.fc.weight"`. If there are still too many groups, the last one holds those with the
        least trace.
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
        label: combined(curvatures[name] for name in names).trace for label, names in groups.items()
    }
    shown = set(sorted(groups, key=trace.__getitem__, reverse=True)[: rows - 1])
    others = [name for label, names in groups.items() if label not in shown for name in names]
    kept = {label: names for label, names in groups.items() if label in shown}
    return {**kept, f"{len(groups) - len(kept)} others": others}


def measure(curvatures: Mapping[str, Tensor]) -> dict[str, Curvature]:
    """Sums and largest entries of tensors, read from the device together: each read waits for it.

    Args:
        curvatures: Real tensors, by name. If some are sharded, this is a collective.
    """
    alike: dict[Groups, list[str]] = {}
    for name, tensor in curvatures.items():
        alike.setdefault(shard_groups(tensor), []).append(name)
    found = {}
    for groups, names in alike.items():
        parts = [local(curvatures[name]) for name in names]
        tops = [largest_entry(part) for part in parts]
        device = parts[0].device
        sums = sum_over(torch.stack([part.sum().to(device) for part in parts]), groups)
        largest = max_over(torch.stack([top.to(device) for top in tops]), groups)
        read = torch.stack([sums, largest]).tolist()
        for name, trace, top in zip(names, *read, strict=True):
            found[name] = Curvature(curvatures[name].numel(), trace, top)
    return {name: found[name] for name in curvatures}


def check_finite_curvature(curvatures: Mapping[str, Curvature]) -> None:
    """Refuse a curvature that no finite penalty follows from.

    Raises:
        ValueError: An entry is not finite; the message names the parameters.
    """
    names = [name for name, one in curvatures.items() if not math.isfinite(one.largest)]
    if names:
        raise ValueError(
            "The curvature of the penalty must be finite; found that it overflows for "
            f"{listed_names(names)}. Fix: use a smaller prior_precision."
        )
