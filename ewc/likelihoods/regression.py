"""Real targets with Gaussian noise."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ewc.data.structures import describe
from ewc.errors import InvalidBatch
from ewc.likelihoods._arguments import function, output_indices, positive
from ewc.likelihoods.heads import head_of, real_tensor
from ewc.likelihoods.pointwise import Fault, Pointwise, Reading, TargetTransform, spread


class Regression(Pointwise):
    """Real targets with Gaussian noise: the sum over all outputs of (y - t)^2 / (2 variance).

    The constant of the Gaussian, which has no gradient, is left out. Outputs are `[N, ...]`;
    targets have exactly the shape of the outputs (of the allowed ones, if `allowed_outputs` is
    given): they are never broadcast.

    Exact Fisher: one term y[d] / sqrt(variance[d]) for each output d. Targets are not needed;
    present ones are validated.

    Args:
        variance: The variance of the noise, in squared units of the targets, > 0: a number, or a
            tensor that broadcasts to the (allowed) outputs and is the same for all samples.
        allowed_outputs: Indices of outputs in their last dimension. None: all.
        target_transform: Applied first to the targets of a batch, `transform(targets)`, and never
            to drawn ones. It sees any sub-batch, also inside vmap.

    Raises:
        ValueError: `variance` is not finite or not > 0; `allowed_outputs` is empty, or has
            negative or repeated indices.
        TypeError: An argument is of another type.

    Example:
        >>> Regression(variance=0.5).nll(torch.zeros(2, 3), torch.ones(2, 3))
        tensor([3., 3.])
    """

    def __init__(
        self,
        variance: float | Tensor = 1.0,
        allowed_outputs: Iterable[int] | None = None,
        target_transform: TargetTransform | None = None,
    ) -> None:
        self.variance = positive("variance", variance)
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
    @property
    def takes_batches(self) -> bool:
        return type(self) is Regression and self.target_transform is None

    @override
    def _head(self, outputs: Any) -> Tensor:
        values = real_tensor(outputs, type(self).__name__)
        if values.dim() < (1 if self.allowed_outputs is None else 2):
            raise InvalidBatch(
                "Regression needs outputs [N, ...], with a last dimension for allowed_outputs to "
                f"select from, if given; found outputs {describe(values)}. Mend: the model's "
                "outputs, in forward."
            )
        return head_of(values, self.allowed_outputs, dim=-1)

    @override
    def _read(self, head: Tensor, targets: Tensor, counts: Tensor | None) -> Reading:
        if targets.shape != head.shape or targets.is_complex():
            which = "outputs" if self.allowed_outputs is None else "outputs in allowed_outputs"
            raise InvalidBatch(
                f"Regression needs real targets of the shape of the {which}, {list(head.shape)}; "
                f"found {describe(targets)}, and they are never broadcast. Mend: reshape them in "
                "target_transform, or the outputs in forward."
            )
        targets = targets.to(head.dtype)
        wrong = ~targets.isfinite()
        if counts is not None:
            wrong = wrong & spread(counts, wrong)
        fault = Fault(
            wrong,
            lambda: (
                f"targets must be finite (as {head.dtype}); found NaN or infinite ones. Mend: "
                "leave their samples out, or mask their steps (TimeSeries)."
            ),
        )
        return Reading(targets, counts, fault)

    @override
    def _losses(self, head: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (head - targets).square() / self._variance_for(head)

    @override
    def _draw(self, head: Tensor) -> Tensor:
        return head + self._variance_for(head) ** 0.5 * torch.randn_like(head)

    @override
    def _terms(self, head: Tensor) -> Tensor:
        return (head / self._variance_for(head) ** 0.5).unsqueeze(0)

    def _variance_for(self, head: Tensor) -> float | Tensor:
        if not isinstance(self.variance, Tensor):
            return self.variance
        # With a 1 in the place of the samples: a batch of one must be possible.
        given, wanted = self.variance.shape, (1, *head.shape[1:])
        fits = len(given) <= len(wanted) and all(
            a in (1, b) for a, b in zip(reversed(given), reversed(wanted), strict=False)
        )
        if not fits:
            raise InvalidBatch(
                "the variance must broadcast to the (allowed) outputs of one sample, "
                f"{list(wanted)}; found {list(given)}. Mend: its shape; a variance for each "
                "sample needs a Custom likelihood."
            )
        return self.variance.to(head.device, head.dtype, non_blocking=True)
