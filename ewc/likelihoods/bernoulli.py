"""Independent yes/no outputs."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from ewc._checks import function
from ewc.likelihoods.faults import Fault
from ewc.likelihoods.heads import output_indices
from ewc.likelihoods.pointwise import Pointwise, Targets, TargetTransform


class Bernoulli(Pointwise, takes_batches=True):
    """Independent yes/no outputs, one or many per sample: binary and multi-label classification.

    The negative log-likelihood (NLL) of a sample is the sum over all outputs y of
    -t * log p - (1 - t) * log(1 - p) with p = sigmoid(y). Outputs are logits `[N]` or `[N, ...]`.
    Targets t have exactly the shape of the outputs (of the allowed outputs, if `allowed_outputs` is
    given), and are never broadcast. They are 0 or 1, of any type, or probabilities; the NLL of
    probabilities is the expected one. A boolean tensor of that shape after the targets is a mask:
    outputs where it is False contribute nothing (unknown labels). 1-D integers after the targets
    (ids, lengths) are ignored.

    The exact Fisher information is the sum over outputs d of
    p[d] * (1 - p[d]) * (gradient of y[d])^2. It takes one backward pass per output. Targets are
    optional, and are validated.

    Source: Martens, "New insights and perspectives on the natural gradient method", JMLR 2020.

    Args:
        allowed_outputs: Indices of outputs in their last dimension. None: all.
        target_transform: A function `transform(targets)` that is applied first to the targets of a
            batch. It may be called on any part of a batch, also inside vmap.

    Raises:
        ValueError: `allowed_outputs` is empty, or has negative or repeated indices.
        TypeError: An argument has a wrong type.

    Example:
        >>> Bernoulli().nll(torch.zeros(2, 3), torch.tensor([[1, 0, 1], [0, 0, 0]]))
        tensor([2.0794, 2.0794])
    """

    def __init__(
        self,
        allowed_outputs: Iterable[int] | None = None,
        *,
        target_transform: TargetTransform | None = None,
    ) -> None:
        self.allowed_outputs = output_indices(allowed_outputs)
        self.target_transform = (
            None if target_transform is None else function("target_transform", target_transform)
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(allowed_outputs={self.allowed_outputs}, "
            f"target_transform={self.target_transform})"
        )

    @override
    def read_targets(self, head: Tensor, targets: Tensor, mask: Tensor | None, /) -> Targets:
        values, mask, _ = super().read_targets(head, targets, mask)
        fault = Fault(
            ~((values >= 0) & (values <= 1)),  # `~`: NaN is wrong too
            "targets must be 0 or 1, or probabilities; found others. Fix: map them in "
            "target_transform; mask those that are not known, with a boolean tensor after the "
            "targets.",
        )
        return Targets(values, mask, (fault,))

    @override
    def position_nll(self, head: Tensor, targets: Tensor, /) -> Tensor:
        # An answer that an infinite logit rules out costs nothing, not NaN, where it is not given.
        yes = torch.where(targets > 0, targets * F.logsigmoid(head), 0)
        no = torch.where(targets < 1, (1 - targets) * F.logsigmoid(-head), 0)
        return -(yes + no)

    @override
    def position_sample(self, head: Tensor, /) -> Tensor:
        return head.sigmoid().bernoulli()

    @override
    def position_terms(self, head: Tensor, /) -> Tensor:
        # E[(p - t)^2] = p (1 - p): its root times the logit has that squared gradient.
        logit = head.detach()
        root = ((F.logsigmoid(logit) + F.logsigmoid(-logit)) / 2).exp()
        return torch.where(logit.isinf(), 0, root * head).unsqueeze(0)
