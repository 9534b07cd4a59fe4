"""What is differentiated: one or more terms for each sample, by `fisher_type`.

A sample contributes the sum of the squared gradients of its terms to the Fisher information:

- `"empirical"`: one term, the negative log-likelihood of the targets in the data;
- `"mc"`: one term, that of targets drawn from the model's predictive distribution;
- `"exact"`: several terms; the sum of their squared gradients is the expectation over that
  distribution.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ewc import _vmap
from ewc._options import FisherType
from ewc.data.advice import accepts, signature
from ewc.data.structures import describe
from ewc.errors import InvalidBatch
from ewc.likelihoods import Likelihood


class NoTensorOutputs(Exception):  # noqa: N818 - a condition, not an error: as StopIteration
    """The outputs of a model hold no tensor that depends on the parameters."""


def terms(
    likelihood: Likelihood,
    fisher_type: FisherType,
    outputs: Any,
    rest: tuple[Any, ...],
    samples: int,
) -> Tensor:
    """The terms of `samples` samples, `[K, samples]`.

    Raises:
        InvalidBatch: If the likelihood does not return one differentiable value per sample.
    """
    found = values(likelihood, fisher_type, outputs, rest)
    if fisher_type == "exact":
        required = f"exact_terms(outputs, *rest) -> [K, {samples}]"
        dims = 2
    else:
        required = f"nll(outputs, *rest) -> [{samples}], one value per sample, not reduced"
        dims = 1
    required = f"{type(likelihood).__name__} must define {required}"
    if not isinstance(found, Tensor):
        raise InvalidBatch(f"{required}; found {type(found).__name__}.")
    if found.dim() != dims or found.shape[-1] != samples:
        raise InvalidBatch(
            f"{required}; found a tensor of shape {list(found.shape)}. Fix: reduce over everything "
            "but the samples (reduction='none', then sum over the rest)."
        )
    if not _vmap.differentiable(found):
        raise InvalidBatch(
            f"{required}, which depends on the parameters; found a tensor without a graph. Fix: do "
            "not detach the outputs, do not compute them under no_grad, and use at least one "
            "protected parameter."
        )
    if not found.is_floating_point():
        raise InvalidBatch(f"{required}, of real numbers; found {found.dtype}.")
    return found if dims == 2 else found.unsqueeze(0)


def values(
    likelihood: Likelihood, fisher_type: FisherType, outputs: Any, rest: tuple[Any, ...]
) -> Any:
    """What the likelihood returns, `[N]`, or `[K, N]` if exact; not checked.

    Raises:
        InvalidBatch: It does not take these arguments.
    """
    try:
        if fisher_type == "exact":
            return likelihood.exact_terms(outputs, *rest)
        return (likelihood.nll if fisher_type == "empirical" else likelihood.sampled_nll)(
            outputs, *rest
        )
    except TypeError as error:
        name, written = "nll", likelihood.function
        if fisher_type == "exact":
            name, written = "exact_terms", likelihood.exact_terms
        elif fisher_type == "mc":
            rest = rest or ("drawn targets",)
        if accepts(written, outputs, *rest):
            raise
        raise InvalidBatch(
            f"the likelihood is called as {name}(outputs, *rest), where rest is what follows the "
            f"inputs in a batch; found {name}{signature(written)} and rest = {describe(rest)}. "
            f"Fix: let it take them, {name}(outputs, targets, *_); or yield what it takes: "
            "((x,) for x, *_ in loader) for the outputs alone, ((x, y) for x, y, *_ in loader) for "
            "one more."
        ) from error


def surrogate_terms(outputs: Any, rest: tuple[Any, ...], samples: int) -> Tensor:
    """A term of one sample that needs no drawn targets, `[1, 1]`: a weighted sum of all outputs.

    Raises:
        NoTensorOutputs: No tensor that depends on the parameters is found in the outputs.
    """
    weighted = []
    for tensor in _differentiable(outputs, set()):
        flat = tensor.abs().flatten() if tensor.is_complex() else tensor.flatten()
        weighted.append((flat * torch.arange(1.0, 1 + len(flat), device=flat.device).cos()).sum())
    if not weighted:
        raise NoTensorOutputs
    return torch.stack([each.to(weighted[0]) for each in weighted]).sum().view(1, 1)


def _differentiable(value: Any, visited: set[int]) -> Iterator[Tensor]:
    """The tensors that depend on the parameters, in containers and attributes of objects."""
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        if _vmap.differentiable(value):
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _differentiable(each, visited)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _differentiable(each, visited)
    elif hasattr(value, "__dict__"):
        yield from _differentiable(vars(value), visited)
