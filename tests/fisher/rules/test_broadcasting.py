"""Parameters added to samples, multiplied with them, joined and indexed, on random shapes."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ewc import Custom
from tests import oracle
from tests.support.asserts import assert_close
from tests.support.collecting import collected
from tests.support.rules import Applied, Function, check, few, fewer, loss, noise, seeds, small


def away(tensor: Tensor) -> Tensor:
    """From zero, to divide by."""
    return tensor.abs() + 0.5


def in_place(name: str) -> Function:
    """Written into, and read by another name."""

    def write(x: Tensor, p: Tensor) -> Tensor:
        x = x.expand(torch.broadcast_shapes(x.shape, p.shape)).clone()
        same = x
        getattr(x, name)(away(p))
        return same

    return write


OPERATORS: dict[str, Function] = {
    "x + p": lambda x, p: x + p,
    "p + x": lambda x, p: p + x,
    "x - p": lambda x, p: x - p,
    "p - x": lambda x, p: p - x,
    "x * p": lambda x, p: x * p,
    "p * x": lambda x, p: p * x,
    "x / p": lambda x, p: x / away(p),
    "p / x": lambda x, p: p / away(x),
    "add": lambda x, p: torch.add(x, p, alpha=3),
    "add, turned": lambda x, p: torch.add(p, x, alpha=3),
    "sub": lambda x, p: x.sub(p, alpha=-2),
    "sub, turned": lambda x, p: torch.subtract(p, x, alpha=2),
    "multiply": lambda x, p: torch.multiply(p, x),
    "true_divide": lambda x, p: torch.true_divide(x, away(p)),
    "where": lambda x, p: torch.where(x > 0, x, p) + torch.where(x > 1, p, x),
    "where a number is": lambda x, p: torch.where(x > 0, p, -1e4) + x.sin(),
    "addcmul": lambda x, p: torch.addcmul(x, x.sin(), p, value=2),
    "addcmul, turned": lambda x, p: torch.addcmul(p, x.sin(), x),
    "lerp": lambda x, p: torch.lerp(x, x.sin(), p),
    "x += p": in_place("__iadd__"),
    "x -= p": in_place("__isub__"),
    "x *= p": in_place("mul_"),
    "x /= p": in_place("__itruediv__"),
}


@fewer
@given(st.lists(small, min_size=1, max_size=3), small, st.booleans(), seeds, st.data())
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(
    name: str, sizes: list[int], n: int, strided: bool, seed: int, data: st.DataObject
) -> None:
    def thinned() -> tuple[int, ...]:
        return tuple(size if data.draw(st.booleans()) else 1 for size in sizes)

    of_sample, of_parameter = thinned(), thinned()[data.draw(st.integers(0, len(sizes))) :]
    x, function = noise(seed, n, *of_sample, strided=strided), OPERATORS[name]
    whole = torch.broadcast_shapes(of_sample, of_parameter)
    # Where the samples alone have the size of the output, and what is written to asks a gradient.
    path = "rule" if math.prod(whole) == math.prod(of_sample) else None
    check(Applied(function, of_parameter), x, path=None)
    check(Applied(lambda x, w, p: function(x * w, p), (), of_parameter), x, path=path)


@pytest.mark.parametrize("name", ["x + p", "p * x", "x / p", "x *= p"])
@pytest.mark.parametrize(
    "types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("shapes", [((5, 2), (2,)), ((5, 2), ()), ((5,), (1,)), ((5,), ())])
def test_types_are_promoted_as_in_pytorch(name: str, types: Any, shapes: Any) -> None:
    net = Applied(OPERATORS[name], shapes[1]).to(types[1])
    x = noise(0, *shapes[0]).to(types[0])
    seen = []

    def nll(outputs: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return loss(outputs.float().unsqueeze(1) if outputs.dim() < 2 else outputs.float())

    found = collected(net, [(x,)], likelihood=Custom(nll))
    assert len(set(seen)) == 1
    expected = oracle.empirical(net, (x,), nll)
    assert_close(found.sums, expected, 0.05)
    assert all(each.dtype == torch.float32 for each in found.sums.values())


@few
@given(small, small, small, st.booleans(), seeds)
def test_tokens(n: int, positions: int, wide: int, first: bool, seed: int) -> None:
    def join(x: Tensor, token: Tensor, register: Tensor) -> Tensor:
        tokens = token.expand(x.shape[0], -1, -1), register.repeat(x.shape[0], 1, 1)
        pieces = (*tokens, x, tokens[0]) if first else (x, *tokens)
        return torch.cat(pieces, 1 if first else -2)

    x = noise(seed, n, positions, wide)
    check(Applied(join, (1, 1, wide), (2, wide)), x)

    def stacked(x: Tensor, p: Tensor) -> Tensor:
        return torch.stack([x, p.expand_as(x), x.sin()], dim=1 if first else -1)

    check(Applied(stacked, (1, positions, wide)), x)
    check(Applied(stacked, (wide,)), noise(seed, n, wide), path="rule")


INDEXED: dict[str, Function] = {
    "rows": lambda i, p: p[i],
    "entries": lambda i, p: p[0, :, 0][i],
    "list of rows": lambda i, p: p[i[:, [0]]],
    "columns": lambda i, p: p[:, i].movedim(1, 0),
    "both": lambda i, p: p[i, i.flip(1)],
    "last two": lambda i, p: p[:, i, i % 2].movedim(1, 0),
    "negative": lambda i, p: p[-1 - i],
    "index_select": lambda i, p: p.index_select(0, i.flatten()).unflatten(0, i.shape),
    "index_select, columns": lambda i, p: (
        torch.index_select(p, -2, i.flatten()).unflatten(1, i.shape).movedim(1, 0)
    ),
    "torch.embedding": lambda i, p: torch.embedding(p.flatten(1), i),
    "the same for all": lambda i, p: i.unsqueeze(2) * p[torch.tensor([1, 1])].sum((0, 1)),
}


@fewer
@given(small, small, small, seeds)
@pytest.mark.parametrize("name", INDEXED)
def test_indexed_by_the_inputs(name: str, n: int, positions: int, wide: int, seed: int) -> None:
    torch.manual_seed(seed)
    i = torch.randint(3, (n, positions)).double()
    check(Applied(lambda i, p: INDEXED[name](i.long(), p), (3, 3, 1 + wide)), i)


def test_an_index_out_of_range_is_still_an_error() -> None:
    net = Applied(lambda i, p: p[i].sum(1), (3, 2)).double()
    i = torch.tensor([[0], [1], [2], [3]])
    with pytest.raises(IndexError):
        collected(net, [(i,)], likelihood=Custom(loss))
