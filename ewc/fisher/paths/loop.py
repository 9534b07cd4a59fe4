"""One sample at a time through plain autograd: always right, and slow."""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ewc.data.batch import Batch
from ewc.fisher.gradients import add_square
from ewc.fisher.paths.graph import nodes


def add_singly(
    batch: Batch,
    parameters: Mapping[str, nn.Parameter],
    totals: Mapping[str, Tensor],
    terms: Callable[[Any], Tensor],
    restore: Callable[[], None],
    *,
    early: Collection[str] = (),
) -> set[str]:
    """Run every sample forward once, and back once for each term; add the squared gradients.

    Args:
        batch: The samples.
        parameters: The parameters to differentiate by, by name.
        totals: For each, where its squares are added.
        terms: `terms(raw) -> [K]`, those of one sample, differentiable.
        restore: Called after each sample, so that the next one starts from the same.
        early: The names of those whose gradients are squared when they arrive, and not held. It
            leaves a trace on a parameter to have had a hook: these must be the library's own.

    Returns:
        The names of the parameters that a gradient arrived at.

    Raises:
        ValueError: If the model checkpoints activations in the reentrant way, past which only
            `backward()` finds the parameters.
    """
    used = set()
    leaves = list(parameters.values())

    def receive(name: str, gradient: Tensor) -> None:
        used.add(name)
        add_square(totals[name], gradient)

    def receive_early(name: str, gradient: Tensor) -> Tensor:
        receive(name, gradient)
        return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

    with ExitStack() as stack:
        for name in early:
            hook = parameters[name].register_hook(partial(receive_early, name))
            stack.callback(hook.remove)
        for n in range(batch.size):
            of_one = terms(batch.take(n, n + 1).raw)
            if n == 0:
                _refuse_reentrant(of_one)
            last = len(of_one) - 1
            for k, term in enumerate(of_one.unbind(0)):
                found = torch.autograd.grad(term, leaves, retain_graph=k < last, allow_unused=True)
                for name, gradient in zip(parameters, found, strict=True):
                    if gradient is not None and name not in early:
                        receive(name, gradient)
            restore()
    return used


def _refuse_reentrant(terms: Tensor) -> None:
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes(terms)):
        raise ValueError(
            "expected a model whose gradients torch.autograd.grad finds; found reentrant "
            "activation checkpointing, inside which it finds none: the Fisher of the parameters "
            "there would be zero. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
