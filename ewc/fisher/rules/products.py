"""Products of one parameter with samples: `x @ W`, `W @ x`, `torch.bmm`, `torch.einsum`, ...

Each is a contraction, written with a letter for each dimension as in `torch.einsum`, in which
every letter of the parameter plays one of three parts.

Index legend: `n` sample, `e` in the input, the parameter and the output (experts, groups),
`i` in the input and the parameter, `o` in the parameter and the output, `s` in the input and the
output (positions).
"""

import math
from collections.abc import Sequence
from string import ascii_letters

import torch
from torch import Tensor
from typing_extensions import override

from ewc.fisher.gradients import Arranged, Gradient, Outer, Total, alike
from ewc.fisher.rules.linear import positions
from ewc.fisher.rules.registry import NotCovered, Operation, decomposition, rule

LOOP_ELEMENTS = 2**12
"""How large the matrices of a stack must be to be worth a call each."""


class Outers(Gradient):
    """`grad[n, e, i, o] = sum_s left[n, e, s, i] * right[n, e, s, o]`: a stack of products.

    Args:
        left: `[N, E, S, I]`.
        right: `[N, E, S, O]`.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.samples = left.shape[0]

    @override
    def per_sample(self, start: int, stop: int) -> Tensor:
        left, right = alike(self.left[start:stop], self.right[start:stop])
        return left.mT @ right

    @override
    def add_squares(self, total: Tensor) -> None:
        if self.left.shape[2] == 1 or total[0].numel() > LOOP_ELEMENTS:
            stack = zip(self.left.unbind(1), self.right.unbind(1), total.unbind(0), strict=True)
            for left, right, each in stack:
                Outer(left, right).add_squares(each)
        else:
            super().add_squares(total)


def contract(op: Operation, input: Tensor, weight: Tensor, x: str, w: str, out: str) -> Tensor:
    """`torch.einsum(f"{x},{w}->{out}", input, weight)`, one letter for each dimension."""
    value, data = op.value(weight), op.samples(input)
    if len(set(x)) < len(x) or len(set(w)) < len(w):
        raise NotCovered
    sizes, given = dict(zip(w, value.shape, strict=True)), dict(zip(x, input.shape, strict=True))
    # A dimension of size one that stands for any number of times the same is left out.
    ones = [at for at in w if sizes[at] == 1 != given.get(at, 1)]
    idle = [at for at in x if given[at] == 1 != sizes.get(at, 1)]
    value = value.squeeze([w.index(at) for at in ones])
    data = data.squeeze([x.index(at) + 1 for at in idle])
    within, x = "".join(at for at in w if at not in ones), "".join(at for at in x if at not in idle)
    e = [at for at in within if at in x and at in out]
    i = [at for at in within if at in x and at not in out]
    o = [at for at in within if at not in x and at in out]
    s = [at for at in x if at not in within]
    if len(e) + len(i) + len(o) < len(within) or not set(s) <= set(out):
        raise NotCovered  # summed over one of the two alone
    n = next(each for each in ascii_letters if each not in x + w + out)
    lengths = [math.prod(sizes[at] for at in group) for group in (e, i, o)]

    def matrices(tensor: Tensor, letters: str, columns: list[str]) -> Tensor:
        """`[N, E, S, columns]`."""
        order = [letters.index(at) + 1 for at in (*e, *s, *columns)]
        width = math.prod(sizes[at] for at in columns)
        return tensor.permute(0, *order).reshape(len(tensor), lengths[0], -1, width)

    def gradient(g: Tensor) -> Gradient:
        left, right = matrices(data, x, i), matrices(g, out, o)
        inner: Gradient = Outers(left, right)
        flat = lengths
        if not i and not o:
            inner, flat = Total((left * right).squeeze(3).transpose(1, 2)), lengths[:1]
        elif not e:
            inner, flat = Outer(left.squeeze(1), right.squeeze(1)), lengths[1:]
        order = [*ones, *e, *i, *o]
        shape = [sizes[at] for at in order]
        return Arranged(inner, flat, shape, [order.index(at) for at in w])

    return op.record(torch.einsum(f"{n}{x},{within}->{n}{out}", data, value), {weight: gradient})


def _either(op: Operation, a: Tensor, b: Tensor, of_a: str, of_b: str, out: str) -> Tensor:
    """A contraction in which either `a` or `b` is the parameter."""
    if op.is_protected(b):
        return contract(op, a, b, of_a, of_b, out)
    return contract(op, b, a, of_b, of_a, out)


@rule(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
@rule(torch.bmm, torch.Tensor.bmm, torch.mv, torch.Tensor.mv, torch.dot, torch.Tensor.dot)
def matmul(op: Operation, input: Tensor, other: Tensor) -> Tensor:
    """`grad W[n, i, o] = sum_s x[n, s, i] g[n, s, o]` for `x @ W`; others as they come."""
    if op.is_protected(other) and other.dim() == 2 and input.dim() > 0:
        x = op.samples(input)
        out = x @ op.value(other)
        return op.record(out, {other: lambda g: Outer(positions(x), positions(g))})
    if input.dim() == 0 or other.dim() == 0:
        raise NotCovered
    batch = ascii_letters[: max(input.dim(), other.dim(), 2) - 2]
    of_input = batch[len(batch) - input.dim() + 2 :] + "YX" if input.dim() > 1 else "X"
    of_other = batch[len(batch) - other.dim() + 2 :] + "XZ" if other.dim() > 1 else "X"
    of_out = batch + "Y" * (input.dim() > 1) + "Z" * (other.dim() > 1)
    return _either(op, input, other, of_input, of_other, of_out)


@rule(torch.inner, torch.Tensor.inner)
def inner(op: Operation, input: Tensor, other: Tensor) -> Tensor:
    """Over the last dimension of both."""
    if input.dim() == 0 or other.dim() == 0:
        raise NotCovered
    of_input, of_other = ascii_letters[: input.dim()], ascii_letters[26 : 26 + other.dim()]
    out = of_input[:-1] + of_other[:-1]
    return _either(op, input, other, of_input, of_other[:-1] + of_input[-1], out)


@rule(torch.outer, torch.Tensor.outer, torch.ger, torch.Tensor.ger)
def outer(op: Operation, input: Tensor, vec2: Tensor) -> Tensor:
    """`out[a, b] = input[a] * vec2[b]`."""
    return _either(op, input, vec2, "a", "b", "ab")


@rule(torch.tensordot)
def tensordot(
    op: Operation,
    a: Tensor,
    b: Tensor,
    dims: int | Sequence[Sequence[int]] = 2,
    out: Tensor | None = None,
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
    return _either(op, a, b, "".join(of_a), "".join(of_b), free)


@rule(torch.einsum)
def einsum(op: Operation, equation: str, *operands: Tensor) -> Tensor:
    """Of two operands, no letter twice in one of them."""
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
    return _either(op, *operands, one, other, out.replace("...", "".join(dots)))


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
