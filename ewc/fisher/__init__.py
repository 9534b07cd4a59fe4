"""The diagonal Fisher information: sums of squared per-sample gradients, from batches.

Users of the library need nothing from here, unless they add a rule for an operation of their own:
`rule`, `decomposition`, `NotCovered`, and the forms of gradient that a rule may return.
"""

from ewc.fisher import rules as _rules  # noqa: F401  (registers the rules)
from ewc.fisher.collection import Squares, collect
from ewc.fisher.gradients import Dense, Gradient, Outer, Rows, Sum
from ewc.fisher.rules import NotCovered, Operation, decomposition, rule

__all__ = [
    "Dense",
    "Gradient",
    "NotCovered",
    "Operation",
    "Outer",
    "Rows",
    "Squares",
    "Sum",
    "collect",
    "decomposition",
    "rule",
]
