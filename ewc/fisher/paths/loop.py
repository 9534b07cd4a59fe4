"""The loop: one sample at a time by plain autograd. Other methods are verified against it."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ewc.data.batch import Batch
from ewc.fisher.gradients import add_square
from ewc.fisher.notes import calling
from ewc.fisher.paths.graph import correct_batch_norms, nodes


def run_loop(
    batch: Batch,
    parameters: Mapping[str, nn.Parameter],
    sums: Mapping[str, Tensor],
    terms: Callable[[Any], Tensor],
    restore: Callable[[], None],
    *,
    hooked: Collection[str] = (),
) -> set[str]:
    """Run every sample forward once, and back once for each term; add the squared gradients.

    Args:
        batch: The samples.
        parameters: The parameters to differentiate by, by name.
        sums: For each, where its squares are added.
        terms: `terms(raw) -> [K]`, those of one sample, differentiable.
        restore: Called after each sample, so that the next run starts from the same state.
        hooked: The names of parameters whose gradients are squared in a hook when they arrive, and
            released. A removed hook still leaves a trace on a parameter, so these must not be the
            user's.

    Returns:
        The names of the parameters that a gradient reached.

    Raises:
        ValueError: The model uses reentrant activation checkpointing, past which only `backward()`
            finds the parameters.
    """
    reached = set()
    leaves = list(parameters.values())

    def receive(name: str, gradient: Tensor) -> None:
        reached.add(name)
        add_square(sums[name], gradient)

    def receive_and_release(name: str, gradient: Tensor) -> Tensor:
        receive(name, gradient)
        return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

    with ExitStack() as stack:
        for name in hooked:
            hook = parameters[name].register_hook(partial(receive_and_release, name))
            stack.callback(hook.remove)
        for n in range(batch.size):
            of_one = terms(batch.take(n, n + 1).raw)
            graph = list(nodes(of_one.grad_fn))
            if n == 0:
                _refuse_reentrant(graph)
            correct_batch_norms(graph)
            del graph
            last = len(of_one) - 1
            for k, term in enumerate(of_one.unbind(0)):
                with calling(1):  # functions of the user's own have a backward of their own
                    found = torch.autograd.grad(
                        term, leaves, retain_graph=k < last, allow_unused=True
                    )
                for name, gradient in zip(parameters, found, strict=True):
                    if gradient is not None and name not in hooked:
                        receive(name, gradient)
            restore()
    return reached


def _refuse_reentrant(graph: Iterable[Any]) -> None:
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in graph):
        raise ValueError(
            "torch.autograd.grad must find the gradients of the model; found reentrant activation "
            "checkpointing, inside which it finds none: the Fisher of the parameters there would "
            "be zero. Fix: use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
