"""Rules for the operations whose per-sample gradients have a short formula.

Importing this package registers them all: one file for each family of operations.
"""

from ewc.fisher.rules import (  # noqa: F401  (imported for their registration)
    attention,
    broadcasting,
    convolution,
    embedding,
    joining,
    linear,
    loss,
    normalisation,
    packing,
    products,
    recurrent,
    shapes,
)
from ewc.fisher.rules.registry import NotCovered, Operation, decomposition, rule

__all__ = ["NotCovered", "Operation", "decomposition", "rule"]
