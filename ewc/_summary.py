"""What a consolidation reports.

The step size that training tolerates is bounded by the largest curvature of the penalty, and a
layer that fell back to a slower path costs time: both are visible only here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

_PATHS = {
    "rule": "closed form",
    "vmap": "per-sample gradients",
    "loop": "one sample at a time, slow",
    "unused": "no gradient",
}
_SHOWN = 6


@dataclass(frozen=True, repr=False)
class Summary:
    """One consolidation, and the curvature that the penalty has after it.

    `trace` and `largest` are those of the whole quadratic that is penalised from now on, all tasks
    together (`OnlineEWC`: `decay * F~ + prior_precision`), before `strength`: this is what bounds
    the step. Plain gradient descent on the penalty is stable for `lr * strength * largest < 2`.

    Attributes:
        task: How many tasks have been consolidated, this one included.
        samples: Samples of this consolidation, over all processes.
        trace: Sum of the curvature over all protected entries.
        largest: Largest entry of the curvature.
        paths: How the Fisher of each parameter of this consolidation was computed: `"rule"` (in
            closed form), `"vmap"` (from per-sample gradients), `"loop"` (one sample at a time), or
            `"unused"` (nothing reached the parameter).
        reasons: Why the parameters that went one sample at a time did so.
    """

    task: int
    samples: int
    trace: float
    largest: float
    paths: Mapping[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [
            f"Task {self.task}: {self.samples} samples, trace {self.trace:.4g}, "
            f"largest entry {self.largest:.4g}",
            f"  stable steps: lr * strength < {self.bound:.4g}",
        ]
        groups: dict[tuple[str, str], list[str]] = {}
        for name, path in self.paths.items():
            groups.setdefault((path, self.reasons.get(name, "")), []).append(name)
        for (path, reason), names in groups.items():
            shown = ", ".join(names[:_SHOWN])
            more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
            lines.append(f"  {path} ({_PATHS.get(path, path)}): {shown}{more}")
            if reason:
                lines.append(f"    because {reason}")
        return "\n".join(lines)

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
