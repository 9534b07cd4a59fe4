"""The words that options and results are limited to, as types: a misspelt one is a type error."""

from typing import Literal, TypeAlias

FisherType: TypeAlias = Literal["empirical", "exact", "mc"]
"""The targets of the Fisher information: those in the data (`"empirical"`), the expectation over
the model's predictive distribution (`"exact"`), or one draw from it for each sample (`"mc"`)."""

Reduction: TypeAlias = Literal["mean", "sum"]
"""Whether the Fisher information is the mean over the samples of a task, or their sum."""

Method: TypeAlias = Literal["rule", "vmap", "loop", "unused"]
"""How the per-sample gradients of a parameter were computed: in closed form (`"rule"`), with one
copy of a weight per sample (`"vmap"`), or one sample at a time (`"loop"`). `"unused"`: no gradient
reached the parameter."""
