"""Losses of single samples, which `vmap` takes apart into many small operations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc.fisher.rules.registry import NotCovered, Operation, rule


@rule(F.cross_entropy, always=True)
def cross_entropy(op: Operation, input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Unreduced, over logits `[B, C, ...]`: the samples join the batch dimension."""
    if options.get("reduction", "mean") != "none" or input.dim() < 2:
        raise NotCovered
    logits, targets = op.samples(input), op.samples(target)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), **options)
    return torch.unflatten(loss, 0, logits.shape[:2])
