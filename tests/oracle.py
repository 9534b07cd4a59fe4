"""The slow oracle: one sample at a time, by plain autograd, without anything of the library.

Every estimate of the Fisher information is compared with it.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood of classification, `[N]`."""
    return F.cross_entropy(outputs, targets, reduction="none")


def squares(
    model: nn.Module,
    losses: Callable[[nn.Module, int], Tensor],
    samples: int,
    names: list[str] | None = None,
) -> dict[str, Tensor]:
    """The sum over samples of the squared gradients of each of a sample's terms.

    Args:
        model: Copied, put into eval mode.
        losses: `losses(model, n) -> [K]`, the terms of sample n.
        samples: How many there are.
        names: Of the parameters; None for all that require a gradient.

    Returns:
        By name, as `[*shape]`, in float64.
    """
    model = copy.deepcopy(model).eval()
    parameters = {
        name: p
        for name, p in model.named_parameters()
        if (p.requires_grad if names is None else name in names)
    }
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for n in range(samples):
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        terms = losses(model, n)
        for k in range(len(terms)):
            found = torch.autograd.grad(
                terms[k], list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    gradient = gradient.to_dense() if gradient.is_sparse else gradient
                    total[name] += (gradient.abs().to(torch.float64) ** 2).cpu()
    return total


def one(value: Any, n: int, dim: int = 0) -> Any:
    """Sample n of a tensor, or of each tensor of a tuple or dict, as a batch of one."""
    if isinstance(value, Tensor):
        return value.narrow(0 if value.dim() == 1 else dim, n, 1)
    if isinstance(value, dict):
        return {key: one(each, n, dim) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(one(each, n, dim) for each in value)
    return value


def empirical(
    model: nn.Module,
    batch: tuple[Any, ...],
    nll: Callable[..., Tensor] = nll,
    dim: int = 0,
    call: Callable[[nn.Module, Any], Any] | None = None,
    names: list[str] | None = None,
) -> dict[str, Tensor]:
    """The sum of squares of `nll(outputs, *rest) -> [1]` over the samples of `(inputs, *rest)`."""
    inputs, *rest = batch
    sizes = [t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim()]
    samples = sizes[-1].shape[0 if sizes[-1].dim() == 1 else dim]

    def losses(model: nn.Module, n: int) -> Tensor:
        x = one(inputs, n, dim)
        if call is not None:
            outputs = call(model, (x, *one(rest, n, dim)))
        else:
            outputs = model(*x) if isinstance(x, (tuple, list)) else model(x)
        return nll(outputs, *one(rest, n, dim)).reshape(1)

    return squares(model, losses, samples, names)


def rows(
    model: nn.Module, batch: tuple[Any, ...], nll: Callable[..., Tensor] = nll
) -> dict[str, Tensor]:
    """As `empirical`, from the rows of one batch's graph.

    The judge where PyTorch's own reverse pass is wrong for a batch of one.
    """
    inputs, *rest = batch
    model = copy.deepcopy(model).eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
    for loss in nll(model(inputs), *rest):
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        for name, gradient in zip(parameters, found, strict=True):
            total[name] += gradient.double() ** 2
    return total


def fisher(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], names: list[str] | None = None
) -> dict[str, Tensor]:
    """The diagonal Fisher of classification: the mean over the samples of all batches."""
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    sums = empirical(model, whole, names=names)
    return {name: each / len(whole[1]) for name, each in sums.items()}
