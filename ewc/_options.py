"""The words that options and results are limited to, as types: a misspelt one is a type error."""

from typing import Literal, TypeAlias

FisherType: TypeAlias = Literal["empirical", "exact", "mc"]
"""Whose targets the Fisher information is taken over: the data's, all of them, or drawn ones."""

Reduction: TypeAlias = Literal["mean", "sum"]
"""Whether the Fisher information is the mean over the samples of a task, or their sum."""

Method: TypeAlias = Literal["rule", "vmap", "loop", "unused"]
"""How a parameter's per-sample gradients were computed; "unused": no gradient reached it."""
