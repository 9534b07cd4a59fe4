"""Linear maps: `F.linear`, `torch.addmm`, `F.bilinear`.

Here `g` is the gradient of the output, as in all rules.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc.fisher.gradients import Outer, Sum
from ewc.fisher.rules.registry import NotCovered, Operation, decomposition, rule


def positions(tensor: Tensor, keep: int = 1) -> Tensor:
    """`[N, ..., *kept] -> [N, S, *kept]`: all but the samples and the last `keep` dimensions."""
    return tensor.reshape(tensor.shape[0], -1, *tensor.shape[tensor.dim() - keep :])


@rule(F.linear)
def linear(op: Operation, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y = x W^T + b`, at every position.

        grad W[n, o, i] = sum_s g[n, s, o] x[n, s, i]
        grad b[n, o] = sum_s g[n, s, o]

    With one position, the sum over samples of the squares is a product of two matrices:
    `sum_n grad W[n, o, i]^2 = sum_n g[n, o]^2 x[n, i]^2`, that is `(g * g)^T (x * x)` (BackPACK,
    Dangel et al. 2020). `Outer.add_squares` computes it so.

    Index legend: `n` sample, `s` shared position, `i` input, `o` output.
    """
    x, value = op.samples(input), op.value(weight)
    if value.dim() != 2:
        raise NotCovered
    out = F.linear(x, value, None if bias is None else op.value(bias))
    return op.record(
        out,
        {
            weight: lambda g: Outer(positions(g), positions(x)),
            bias: lambda g: Sum(positions(g)),
        },
    )


@rule(torch.addmm, torch.Tensor.addmm)
def addmm(
    op: Operation, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`y = x W + b`: `linear` with W transposed, as the Conv1D of Hugging Face's GPT-2."""
    bias, weight = op.value(input), op.value(mat2)
    if bias.dim() != 1 or bias.shape[0] != weight.shape[1] or beta != 1 or alpha != 1:
        raise NotCovered
    x = op.samples(mat1)
    out = F.linear(x, weight.t(), bias)
    return op.record(
        out,
        {
            mat2: lambda g: Outer(positions(x), positions(g)),
            input: lambda g: Sum(positions(g)),
        },
    )


@decomposition(F.bilinear)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map of the products of both inputs: `sum_ij W[o, i, j] x[i] y[j]`."""
    products = input1.unsqueeze(-1) * input2.unsqueeze(-2)
    return F.linear(products.flatten(-2), weight.flatten(1), bias)
