"""Real targets with Gaussian noise."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ewc._checks import as_float, function
from ewc.errors import InvalidBatch
from ewc.likelihoods.heads import output_indices
from ewc.likelihoods.pointwise import Pointwise, TargetTransform


class Regression(Pointwise, takes_batches=True):
    """Real targets with Gaussian noise: the sum over all outputs of (y - t)^2 / (2 variance).

    This is the negative log-likelihood without the constant of the Gaussian, which has no gradient.
    Outputs y are `[N, ...]`. Targets t have exactly the shape of the outputs (of the allowed
    outputs, if `allowed_outputs` is given), and are never broadcast. A boolean tensor of that shape
    after the targets is a mask: outputs where it is False contribute nothing. 1-D integers after
    the targets (ids, lengths) are ignored.

    The exact Fisher information is the sum over outputs d of (gradient of y[d])^2 / variance[d]. It
    takes one backward pass per output. Targets are optional, and are validated.

    Source: Martens, "New insights and perspectives on the natural gradient method", JMLR 2020.

    Args:
        variance: The variance of the noise, in squared units of the targets, > 0: a number, or a
            tensor that broadcasts to the (allowed) outputs and is the same for all samples.
        allowed_outputs: Indices of outputs in their last dimension. None: all.
        target_transform: A function `transform(targets)` that is applied first to the targets of a
            batch. It may be called on any part of a batch, also inside vmap.

    Raises:
        ValueError: `variance` is not finite or not > 0; `allowed_outputs` is empty, or has
            negative or repeated indices.
        TypeError: An argument has a wrong type.

    Example:
        >>> Regression(variance=0.5).nll(torch.zeros(2, 3), torch.ones(2, 3))
        tensor([3., 3.])
    """

    def __init__(
        self,
        variance: float | Tensor = 1.0,
        *,
        allowed_outputs: Iterable[int] | None = None,
        target_transform: TargetTransform | None = None,
    ) -> None:
        self.variance = _checked_variance(variance)
        self.allowed_outputs = output_indices(allowed_outputs)
        self.target_transform = (
            None if target_transform is None else function("target_transform", target_transform)
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(variance={self.variance}, allowed_outputs="
            f"{self.allowed_outputs}, target_transform={self.target_transform})"
        )

    @override
    def position_nll(self, head: Tensor, targets: Tensor, /) -> Tensor:
        return 0.5 * (head - targets).square() / self._variance_for(head)

    @override
    def position_sample(self, head: Tensor, /) -> Tensor:
        return head + self._variance_for(head) ** 0.5 * torch.randn_like(head)

    @override
    def position_terms(self, head: Tensor, /) -> Tensor:
        return (head / self._variance_for(head) ** 0.5).unsqueeze(0)

    def _variance_for(self, head: Tensor) -> float | Tensor:
        if not isinstance(self.variance, Tensor):
            return self.variance
        # With 1 for the number of samples: a batch of one must be possible.
        given, wanted = self.variance.shape, (1, *head.shape[1:])
        fits = len(given) <= len(wanted) and all(
            a in (1, b) for a, b in zip(reversed(given), reversed(wanted), strict=False)
        )
        if not fits:
            raise InvalidBatch(
                "the variance must broadcast to the (allowed) outputs of one sample, "
                f"{list(wanted)}; found {list(given)}. Fix: reshape it; for a variance per "
                "sample, use a Custom likelihood."
            )
        return self.variance.to(head.device, head.dtype, non_blocking=True)


def _checked_variance(value: Any) -> float | Tensor:
    """A finite number or tensor > 0: a float, or a floating-point copy on the CPU."""
    rule = "variance must be finite and > 0, a number or a tensor"
    if isinstance(value, Tensor) and value.dtype != torch.bool and not value.is_complex():
        copied = value.detach().to("cpu", copy=True)
        if not bool((copied.isfinite() & (copied > 0)).all()):
            raise ValueError(f"{rule}; found {copied}.")
        return copied if copied.is_floating_point() else copied.to(torch.get_default_dtype())
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{rule}; found {value!r}.")
    number = as_float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{rule}; found {value!r}.")
    return number
