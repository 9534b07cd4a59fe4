"""Linear maps: `F.linear`, `torch.addmm`, `F.bilinear`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc.fisher.gradients import Outer, Total
from ewc.fisher.rules.registry import NotCovered, Operation, rule


def positions(tensor: Tensor, keep: int = 1) -> Tensor:
    """`[N, ..., *kept] -> [N, S, *kept]`: all but the samples and the last `keep` dimensions."""
    return tensor.reshape(tensor.shape[0], -1, *tensor.shape[tensor.dim() - keep :])


@rule(F.linear)
def linear(op: Operation, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`grad W[n, o, i] = sum_s g[n, s, o] x[n, s, i]`, `grad b[n, o] = sum_s g[n, s, o]`."""
    x, value = op.samples(input), op.value(weight)
    if value.dim() != 2:
        raise NotCovered
    out = F.linear(x, value, None if bias is None else op.value(bias))
    return op.record(
        out,
        {
            weight: lambda g: Outer(positions(g), positions(x)),
            bias: lambda g: Total(positions(g)),
        },
    )


@rule(torch.addmm, torch.Tensor.addmm)
def addmm(
    op: Operation, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`x @ W + b`, as the Conv1D of Hugging Face's GPT-2 writes it."""
    bias, weight = op.value(input), op.value(mat2)
    if bias.dim() != 1 or bias.shape[0] != weight.shape[1] or beta != 1 or alpha != 1:
        raise NotCovered
    x = op.samples(mat1)
    out = F.linear(x, weight.t(), bias)
    return op.record(
        out,
        {
            mat2: lambda g: Outer(positions(x), positions(g)),
            input: lambda g: Total(positions(g)),
        },
    )


@rule(F.bilinear)
def bilinear(
    op: Operation, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`grad W[n, o, i, j] = sum_s g[n, s, o] x[n, s, i] y[n, s, j]`."""
    x, y = op.samples(input1), op.samples(input2)
    out = F.bilinear(x, y, op.value(weight), None if bias is None else op.value(bias))

    def weight_gradient(g: Tensor) -> Outer:
        products = positions(x).unsqueeze(3) * positions(y).unsqueeze(2)
        return Outer(positions(g), products.flatten(2), shape=weight.shape)

    return op.record(out, {weight: weight_gradient, bias: lambda g: Total(positions(g))})
