"""Normalisations with a scale and a shift for each channel, and PReLU.

The arguments are those of the functions of `torch`, which `F.layer_norm` and the others call.

Index legend: `n` sample, `s` shared position, `c` channel.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ewc.fisher.gradients import Sum
from ewc.fisher.rules.registry import NotCovered, Operation, decomposition, rule

Normalise = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""`normalise(x, scale, shift)`, of all samples."""


def _affine(
    op: Operation,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Normalise,
    channels: slice | None = None,
) -> Tensor:
    """`grad scale[n, c] = sum_s g[n, s, c] normal[n, s, c]`, `grad shift[n, c] = sum_s g[n, s, c]`.

    The normal values are computed again on the way back: what that needs is kept anyway, and to
    keep them as well (a decomposition into normal values, a product and a sum) was slower.

    Args:
        op: The operation that is replaced.
        input: What is normalised.
        weight: The scale.
        bias: The shift.
        normalise: The operation.
        channels: The dimensions of the scale, samples in front. None: dimension 1 of the input, of
            which `normalise` is given all samples in one batch.
    """
    x = op.samples(input)
    folded = x if channels else x.flatten(0, 1)
    shared = set(range(1, x.dim())) - set(range(x.dim())[channels or slice(2, 3)])

    def over_positions(summands: Tensor) -> Sum:
        return Sum((summands.sum(tuple(shared)) if shared else summands).unsqueeze(1))

    def scale_gradient(g: Tensor) -> Sum:
        return over_positions(g * normalise(folded, None, None).view(x.shape))

    scale, shift = (None if each is None else op.value(each) for each in (weight, bias))
    out = normalise(folded, scale, shift).view(x.shape)
    return op.record(out, {weight: scale_gradient, bias: over_positions})


@rule(torch.layer_norm)
def layer_norm(
    op: Operation,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Scaled and shifted along the last dimensions, all of `normalized_shape`."""

    def normalise(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return torch.layer_norm(x, normalized_shape, scale, shift, eps)

    return _affine(op, input, weight, bias, normalise, slice(-len(normalized_shape), None))


@rule(torch.rms_norm)
def rms_norm(
    op: Operation,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """As `layer_norm`, without centring and shift."""

    def normalise(x: Tensor, scale: Tensor | None, _: Tensor | None) -> Tensor:
        return torch.rms_norm(x, normalized_shape, scale, eps)

    return _affine(op, input, weight, None, normalise, slice(-len(normalized_shape), None))


@rule(torch.group_norm)
def group_norm(
    op: Operation,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Scaled and shifted along dimension 1."""

    def normalise(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return torch.group_norm(x, num_groups, scale, shift, eps, cudnn_enabled)

    return _affine(op, input, weight, bias, normalise)


def _define(function: Callable[..., Tensor]) -> None:
    """Register the rule of `torch.batch_norm` or `torch.instance_norm`."""

    @rule(function)
    def norm(
        op: Operation,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        of_input: bool,
        *options: float,
    ) -> Tensor:
        """Scaled and shifted along dimension 1, by running statistics or those of each sample."""
        if of_input and (function is torch.batch_norm or running_mean is not None):
            raise NotCovered  # it mixes the samples of a batch, or writes to the running statistics

        def normalise(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
            return function(x, scale, shift, running_mean, running_var, of_input, *options)

        return _affine(op, input, weight, bias, normalise)


_define(torch.batch_norm)
_define(torch.instance_norm)


@decomposition(torch.prelu)
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """`x` where it is positive, else `a x`, with one slope for all or one for each channel."""
    if weight.numel() > 1 and input.dim() > 2:
        weight = weight.view(-1, *[1] * (input.dim() - 2))
    return torch.where(input > 0, input, input * weight)
