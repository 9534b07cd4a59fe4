"""One sample at a time through plain autograd: always right, and slow."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ewc._batches import Batch
from ewc.fisher.gradients import add_square


def add_singly(
    batch: Batch,
    parameters: Mapping[str, nn.Parameter],
    totals: Mapping[str, Tensor],
    terms: Callable[[Any, int], Tensor],
    restore: Callable[[], None],
) -> set[str]:
    """Run every sample forward once, and back once for each term; add the squared gradients.

    Args:
        batch: The samples.
        parameters: The parameters to differentiate by, by name.
        totals: For each, where its squares are added.
        terms: `terms(raw, samples) -> [K, samples]`, differentiable.
        restore: Called after each sample, so that the next one starts from the same.

    Returns:
        The names of the parameters that a gradient arrived at.
    """
    used = set()
    leaves = list(parameters.values())
    for n in range(batch.size):
        of_one = terms(batch.take(n, n + 1).raw, 1).squeeze(1)
        last = len(of_one) - 1
        for k, term in enumerate(of_one.unbind(0)):
            found = torch.autograd.grad(term, leaves, retain_graph=k < last, allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    used.add(name)
                    add_square(totals[name], gradient)
        restore()
    return used
