"""Elastic Weight Consolidation for PyTorch.

from ewc import EWC, Classification

regularizer = EWC(model, Classification())                    # next to the optimizer
for loader in tasks:
    for x, y in loader:
        loss = F.cross_entropy(model(x), y) + regularizer()   # every step; 0 before the first
        ...
    regularizer.consolidate(loader)                           # once after each task
"""

from ewc._diagonal_fisher import diagonal_fisher
from ewc._ewc import EWC
from ewc._online import OnlineEWC
from ewc._options import FisherType, Method, Reduction
from ewc._summary import Curvature, Summary
from ewc.errors import (
    InvalidBatch,
    NothingProtectedWarning,
    ReplacedParameterWarning,
    SlowPathWarning,
    ZeroFisherWarning,
)
from ewc.integrations.hypnettorch import context_mod_forward
from ewc.likelihoods import (
    Bernoulli,
    Classification,
    Custom,
    Likelihood,
    Pointwise,
    Regression,
    TimeSeries,
)

__version__ = "0.1.0"

__all__ = [
    "EWC",
    "Bernoulli",
    "Classification",
    "Curvature",
    "Custom",
    "FisherType",
    "InvalidBatch",
    "Likelihood",
    "Method",
    "NothingProtectedWarning",
    "OnlineEWC",
    "Pointwise",
    "Reduction",
    "Regression",
    "ReplacedParameterWarning",
    "SlowPathWarning",
    "Summary",
    "TimeSeries",
    "ZeroFisherWarning",
    "__version__",
    "context_mod_forward",
    "diagonal_fisher",
]
