"""What is differentiated: one or more terms for each sample, by the type of Fisher.

The squared gradients of a sample's terms, summed, are its contribution to the Fisher information:

- `"empirical"`: one term, the negative log-likelihood of the targets in the data;
- `"mc"`: one term, that of targets drawn from the model's predictive distribution;
- `"exact"`: as many terms as the expectation over that distribution takes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ewc import _vmap
from ewc._options import FisherType
from ewc.errors import InvalidBatch
from ewc.likelihoods import Likelihood


class Opaque(Exception):  # noqa: N818 - it says what is the case, as StopIteration does
    """What a model returns holds no tensor that `probe` finds."""


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
    if fisher_type == "exact":
        found = likelihood.exact_terms(outputs, *rest)
        expected = f"exact_terms(outputs, *rest) -> [K, {samples}]"
        dims = 2
    else:
        method = likelihood.nll if fisher_type == "empirical" else likelihood.sampled_nll
        found = method(outputs, *rest)
        expected = f"nll(outputs, *rest) -> [{samples}], one value per sample, not reduced"
        dims = 1
    name = type(likelihood).__name__
    if not isinstance(found, Tensor):
        raise InvalidBatch(f"expected {name}.{expected}; found {type(found).__name__}")
    if found.dim() != dims or found.shape[-1] != samples:
        raise InvalidBatch(
            f"expected {name}.{expected}; found a tensor of shape {list(found.shape)}. "
            "Reduce over everything but the samples (reduction='none', then sum the rest)"
        )
    if not _vmap.differentiable(found):
        raise InvalidBatch(
            f"expected {name}.{expected} that depends on the parameters; found a tensor without "
            "a graph. Do not detach the outputs, nor compute them under no_grad; at least one "
            "protected parameter must take part"
        )
    if not found.is_floating_point():
        raise InvalidBatch(f"expected {name}.{expected} of real numbers; found {found.dtype}")
    return found if dims == 2 else found.unsqueeze(0)


def probe(outputs: Any) -> Tensor:
    """A term of one sample that nothing is drawn for, `[1, 1]`: all outputs, weighed differently.

    Raises:
        Opaque: If no tensor is found in the outputs that depends on the parameters.
    """
    weighed = []
    for tensor in _differentiable(outputs, set()):
        flat = tensor.abs().flatten() if tensor.is_complex() else tensor.flatten()
        weighed.append((flat * torch.arange(1.0, 1 + len(flat), device=flat.device).cos()).sum())
    if not weighed:
        raise Opaque
    return torch.stack([each.to(weighed[0]) for each in weighed]).sum().view(1, 1)


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
