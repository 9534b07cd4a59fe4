"""Products of a weight with samples: `x @ W`, `W @ x`, `torch.bmm`, `torch.einsum`, ...

The products of two matrices, or of two stacks of matrices, have a rule. All other products are
decomposed into these. Each is a contraction, written as in `torch.einsum` with a letter for each
dimension, and a letter is in one of four groups:

    out[e, r, c] = sum_k a[e, r, k] * b[e, k, c]

Index legend: `e` in both operands and in the output (experts, groups), `k` in both operands alone
(summed over), `r` in the first operand and the output (rows), `c` in the second operand and the
output (columns).
"""

import math
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from ewc.fisher.gradients import Outer
from ewc.fisher.rules.registry import NotCovered, Operation, decomposition, rule


@rule(torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm)
def product(op: Operation, input: Tensor, mat2: Tensor) -> Tensor:
    """`grad W[n, i, o] = sum_s x[n, s, i] g[n, s, o]` for `x @ W`; `W @ x` is the same transposed.

    In a stack this holds for each matrix.
    """
    if op.is_protected(mat2):
        x, value = op.samples(input), op.value(mat2)
        out = torch.einsum("n...si,...io->n...so", x, value)
        return op.record(out, {mat2: lambda g: Outer(x, g)})
    x, value = op.samples(mat2), op.value(input)
    out = torch.einsum("...oi,n...is->n...os", value, x)
    return op.record(out, {input: lambda g: Outer(g.mT, x.mT)})


def contract(a: Tensor, b: Tensor, of_a: str, of_b: str, of_out: str) -> Tensor:
    """`torch.einsum(f"{of_a},{of_b}->{of_out}", a, b)`, one letter for each dimension.

    Raises:
        NotCovered: A letter is twice in one operand, or summed over in one operand alone.
    """
    if any(len(set(letters)) < len(letters) for letters in (of_a, of_b, of_out)):
        raise NotCovered
    a_sizes, b_sizes = dict(zip(of_a, a.shape, strict=True)), dict(zip(of_b, b.shape, strict=True))
    # A dimension of size one that stands for any number of times the same is left out.
    a, of_a = _without(a, of_a, [at for at in of_a if a_sizes[at] == 1 < b_sizes.get(at, 1)])
    b, of_b = _without(b, of_b, [at for at in of_b if b_sizes[at] == 1 < a_sizes.get(at, 1)])
    e = [at for at in of_out if at in of_a and at in of_b]
    k = [at for at in of_a if at in of_b and at not in of_out]
    r = [at for at in of_a if at not in of_b]
    c = [at for at in of_b if at not in of_a]
    if set(of_out) != {*e, *r, *c}:
        raise NotCovered
    if not k:
        return torch.mul(_grouped(a, of_a, *of_out), _grouped(b, of_b, *of_out))
    stack = [e] if e else []
    left, right = _grouped(a, of_a, *stack, r, k), _grouped(b, of_b, *stack, k, c)
    out = torch.bmm(left, right) if e else torch.mm(left, right)
    sizes = {**dict(zip(of_a, a.shape, strict=True)), **dict(zip(of_b, b.shape, strict=True))}
    order = [*e, *r, *c]
    out = out.reshape([sizes[at] for at in order])
    return out.permute([order.index(at) for at in of_out])


def _without(tensor: Tensor, letters: str, dropped: Sequence[str]) -> tuple[Tensor, str]:
    """Squeeze the dimensions `dropped`."""
    if not dropped:
        return tensor, letters
    rest = "".join(at for at in letters if at not in dropped)
    return tensor.squeeze([letters.index(at) for at in dropped]), rest


def _grouped(tensor: Tensor, letters: str, *groups: Sequence[str]) -> Tensor:
    """One dimension for each group, of size one where `letters` has none of it.

    A tensor that has this layout is returned as it is: a view of a parameter would be led back.
    """
    order = [letters.index(at) for group in groups for at in group if at in letters]
    shape = [
        math.prod(tensor.shape[letters.index(at)] for at in group if at in letters)
        for group in groups
    ]
    if order != sorted(order):
        tensor = tensor.permute(order)
    return tensor if list(tensor.shape) == shape else tensor.reshape(shape)


@decomposition(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """Matrices or vectors, with any batch dimensions in front."""
    if input.dim() == 0 or other.dim() == 0:
        raise NotCovered
    batch = ascii_letters[: max(input.dim(), other.dim(), 2) - 2]
    of_input = batch[len(batch) - input.dim() + 2 :] + "YX" if input.dim() > 1 else "X"
    of_other = batch[len(batch) - other.dim() + 2 :] + "XZ" if other.dim() > 1 else "X"
    of_out = batch + "Y" * (input.dim() > 1) + "Z" * (other.dim() > 1)
    return contract(input, other, of_input, of_other, of_out)


@decomposition(torch.inner, torch.Tensor.inner)
def inner(input: Tensor, other: Tensor) -> Tensor:
    """Over the last dimension of both."""
    if input.dim() == 0 or other.dim() == 0:
        raise NotCovered
    pairs: Any = ([input.dim() - 1], [other.dim() - 1])  # torch does not annotate it
    product: Tensor = torch.tensordot(input, other, pairs)
    return product


@decomposition(torch.tensordot)
def tensordot(
    a: Tensor, b: Tensor, dims: int | Sequence[Sequence[int]] = 2, out: Tensor | None = None
) -> Tensor:
    """Over the last `dims` dimensions of `a` and the first of `b`, or over pairs of them."""
    if isinstance(dims, int):
        dims = (range(a.dim() - dims, a.dim()), range(dims))
    if isinstance(dims, Tensor) or out is not None:
        raise NotCovered
    of_a, of_b = list(ascii_letters[: a.dim()]), list(ascii_letters[26 : 26 + b.dim()])
    for one, other in zip(*dims, strict=True):
        of_b[other] = of_a[one]
    free = "".join(at for at in of_a + of_b if (at in of_a) != (at in of_b))
    return contract(a, b, "".join(of_a), "".join(of_b), free)


@decomposition(torch.einsum)
def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Of two operands."""
    equation = equation.replace(" ", "")
    if len(operands) != 2 or "->" not in equation or equation.count(",") != 1:
        raise NotCovered
    of_both, out = equation.split("->")
    letters = of_both.split(",")
    spare = [each for each in ascii_letters if each not in equation]
    lengths = [
        each.dim() - len(letter) + 3 if "..." in letter else 0
        for each, letter in zip(operands, letters, strict=True)
    ]
    dots = spare[: max(lengths)]
    one, other = (
        letter.replace("...", "".join(dots[len(dots) - length :]))
        for letter, length in zip(letters, lengths, strict=True)
    )
    return contract(*operands, one, other, out.replace("...", "".join(dots)))


@decomposition(torch.baddbmm, torch.Tensor.baddbmm)
def baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """A product of stacks, added to something."""
    product = torch.bmm(batch1, batch2)
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product
    return torch.add(product, input if beta == 1 else input * beta)
