"""Collection as the tests of `ewc/fisher` call it."""

from typing import Any

import torch

from ewc import Classification
from ewc.fisher import Squares, collect


def collected(model: torch.nn.Module, batches: Any, **options: Any) -> Squares:
    defaults: dict[str, Any] = {
        "likelihood": Classification(),
        "forward": None,
        "fisher_type": "empirical",
        "max_samples": None,
        "generator": None,
    }
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return collect(model, parameters, batches, **{**defaults, **options})
