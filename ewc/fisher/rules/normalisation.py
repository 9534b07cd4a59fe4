"""Normalisations with a scale and a shift for each channel.

Each is the same normalisation without parameters, followed by `scale * normal + shift`, whose
per-sample gradients are sums over the positions of `g * normal` and of `g`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc.fisher.gradients import Total
from ewc.fisher.rules.registry import NotCovered, Operation, rule


def _affine(
    op: Operation,
    normalise: Callable[[Tensor | None, Tensor | None], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    channels: slice,
) -> Tensor:
    """Normalise, then scale and shift along the dimensions `channels`, samples in front.

    `normalise(scale, shift)` is called again on the way back, without them: what it needs is kept
    anyway, its result is not.
    """
    out = normalise(
        None if weight is None else op.value(weight), None if bias is None else op.value(bias)
    )
    dims = range(out.dim())[channels]
    shared = [dim for dim in range(1, out.dim()) if dim not in dims]

    def total(summands: Tensor) -> Total:
        summed = summands.sum(shared) if shared else summands
        return Total(summed.unsqueeze(1))

    return op.record(out, {weight: lambda g: total(g * normalise(None, None)), bias: total})


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    op: Operation,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """The channels are the last dimensions, all of `normalized_shape`."""
    x, channels = op.samples(input), slice(-len(normalized_shape), None)

    def normalise(scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return F.layer_norm(x, normalized_shape, scale, shift, eps)

    return _affine(op, normalise, weight, bias, channels)


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(
    op: Operation,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """As `layer_norm`, without centring and shift."""
    x, channels = op.samples(input), slice(-len(normalized_shape), None)

    def normalise(scale: Tensor | None, _: Tensor | None) -> Tensor:
        return F.rms_norm(x, normalized_shape, scale, eps)

    return _affine(op, normalise, weight, None, channels)


@rule(F.group_norm, torch.group_norm)
def group_norm(
    op: Operation,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """The channels are dimension 1 of the input, behind its own batch dimension."""
    x = op.samples(input)

    def normalise(scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return F.group_norm(x.flatten(0, 1), num_groups, scale, shift, eps).view(x.shape)

    return _affine(op, normalise, weight, bias, slice(2, 3))


@rule(F.instance_norm)
def instance_norm(
    op: Operation,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Statistics of each sample and channel, or running ones."""
    if use_input_stats and running_mean is not None:
        raise NotCovered
    x = op.samples(input)

    def normalise(scale: Tensor | None, shift: Tensor | None) -> Tensor:
        normal = F.instance_norm(
            x.flatten(0, 1), running_mean, running_var, scale, shift, use_input_stats, eps=eps
        )
        return normal.view(x.shape)

    return _affine(op, normalise, weight, bias, slice(2, 3))


@rule(torch.instance_norm)
def instance_norm_as_written_in_aten(
    op: Operation,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """The same with its arguments in another order."""
    statistics = (running_mean, running_var, weight, bias, use_input_stats)
    return instance_norm(op, input, *statistics, eps=eps)


@rule(F.batch_norm)
def batch_norm(
    op: Operation,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """With running statistics alone: those of a batch would mix its samples."""
    if training:
        raise NotCovered
    x = op.samples(input)

    def normalise(scale: Tensor | None, shift: Tensor | None) -> Tensor:
        flat = x.flatten(0, 1)
        return F.batch_norm(flat, running_mean, running_var, scale, shift, eps=eps).view(x.shape)

    return _affine(op, normalise, weight, bias, slice(2, 3))


@rule(torch.batch_norm)
def batch_norm_as_written_in_aten(
    op: Operation,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """The same with its arguments in another order."""
    return batch_norm(op, input, running_mean, running_var, weight, bias, training, eps=eps)


@rule(F.prelu, torch.prelu)
def prelu(op: Operation, input: Tensor, weight: Tensor) -> Tensor:
    """`grad a[n, c] = sum_s g[n, s, c] min(x[n, s, c], 0)`; with one slope c is a position too."""
    x, slope = op.samples(input), op.value(weight)
    if slope.dim() != 1:
        raise NotCovered
    shared = slope.numel() == 1
    shape = slope.shape if shared or x.dim() < 3 else (-1, *[1] * (x.dim() - 3))
    out = torch.where(x > 0, x, x * slope.view(shape))

    def slope_gradient(g: Tensor) -> Total:
        summands = g * x.clamp(max=0)
        if shared:
            return Total(summands.flatten(1).unsqueeze(2))
        if x.dim() < 3:
            return Total(summands.unsqueeze(1))
        return Total(summands.flatten(3).sum(3) if x.dim() > 3 else summands)

    return op.record(out, {weight: slope_gradient})
