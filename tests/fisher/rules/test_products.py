"""Products of one parameter with samples, on random shapes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.rules import Applied, Function, check, few, noise, seeds, small

A, B, C, D = 2, 3, 4, 5
"""Sizes that tell the dimensions apart."""

EINSUMS: dict[str, tuple[int, ...]] = {
    "nabc,cd->nabd": (C, D),
    "nabc,dc->nabd": (D, C),
    "nabc,adc->nabd": (A, D, C),
    "n a b c, d a c -> n b d": (D, A, C),
    "nabc,bcd->nad": (B, C, D),
    "nabc,dce->naebd": (D, C, 2),
    "dce,nabc->nbade": (D, C, 2),
    "nabc,abc->n": (A, B, C),
    "nabc,cab->nac": (C, A, B),
    "nabc,ac->nabc": (A, C),
    "nabc,c->nab": (C,),
    "nabc,d->nabcd": (D,),
    "...c,cd->...d": (C, D),
    "n...c,...cd->n...d": (B, C, D),
    "nabc,xcd->nabxd": (1, C, D),
    "nabc,acd->nabd": (1, C, D),
    "nabc,->nabc": (),
}


@pytest.mark.parametrize("equation", EINSUMS)
@pytest.mark.parametrize("n", [1, 3])
def test_einsum(equation: str, n: int) -> None:
    x = noise(0, n, A, B, C, strided=True)

    def product(x: Tensor, p: Tensor) -> Tensor:
        operands = (p, x) if equation.startswith("dce") else (x, p)
        return torch.einsum(equation, *operands)

    check(Applied(product, EINSUMS[equation]), x)


@pytest.mark.parametrize(
    "equation", ["naac,cd->nd", "nabc,cd->nd", "nabc,cdd->nabd", "nabc,cd->nabcd"]
)
def test_other_einsums(equation: str) -> None:
    shape = (C, D, D) if "cdd" in equation else (C, D)
    path = "rule" if equation == "nabc,cd->nabcd" else "vmap"
    x = noise(0, 3, A, A, C)
    check(Applied(lambda x, p: torch.einsum(equation, x, p), shape), x, path=path)


@few
@given(small, st.lists(small, max_size=2), small, small, st.booleans(), st.booleans(), seeds)
def test_matmul(
    n: int, shared: list[int], i: int, o: int, strided: bool, stacked: bool, seed: int
) -> None:
    x = noise(seed, n, *shared, 3, i, strided=strided)
    stack = tuple(shared) if stacked else ()
    check(Applied(lambda x, p: x @ p, (*stack, i, o)), x)
    check(Applied(lambda x, p: p @ x.mT, (*stack, o, i)), x)
    check(Applied(lambda x, p: p.mT @ x.mT, (*stack, i, o)), x)
    check(Applied(lambda x, p: torch.matmul(x, p), (i,)), x)
    check(Applied(lambda x, p: torch.matmul(p, x), (3,)), x)
    ones = [1] * len(shared)
    check(Applied(lambda x, p: x.transpose(-1, -2).matmul(p), (*ones, 3, o)), x)


@few
@given(small, small, small, small, st.booleans(), seeds)
def test_stacks(n: int, e: int, i: int, o: int, strided: bool, seed: int) -> None:
    x = noise(seed, n, e, i, strided=strided)

    def stack(function: Function) -> Any:
        return lambda x, *p: function(x.transpose(0, 1), *p).transpose(0, 1)

    check(Applied(stack(torch.bmm), (e, i, o)), x)
    check(Applied(stack(lambda x, p: torch.bmm(x, p.mT)), (e, o, i)), x)
    check(Applied(stack(lambda x, p, b: torch.baddbmm(b, x, p)), (e, i, o), (e, 1, o)), x)
    check(
        Applied(stack(lambda x, p, b: b.baddbmm(x, p, beta=0.5, alpha=2)), (e, i, o), (e, 1, o)), x
    )


def test_a_stack_of_large_matrices() -> None:
    x = noise(0, 3, 2, 5, 70)
    check(Applied(lambda x, p: torch.einsum("nesi,eio->neso", x, p), (2, 70, 90)), x)


@few
@given(small, small, small, small, seeds)
def test_other_names(n: int, s: int, i: int, o: int, seed: int) -> None:
    x = noise(seed, n, s, i)
    check(Applied(lambda x, p: torch.tensordot(x, p, 1), (i, o)), x)
    check(Applied(lambda x, p: torch.tensordot(x, p, ([2, 1], [0, 2])), (i, o, s)), x)
    check(Applied(torch.inner, (o, i)), x)
    check(Applied(torch.inner, (i,)), x)
    one = noise(seed, n, i)

    def each(function: Function) -> Any:
        """Of the only row, as a batch of one."""
        return lambda x, p: torch.stack([function(row, p) for row in x])

    check(Applied(each(torch.dot), (i,)), one, path="vmap")
    check(Applied(each(torch.outer), (o,)), one, path="vmap")
    check(Applied(each(lambda row, p: torch.mv(p, row)), (o, i)), one, path="vmap")
    check(Applied(each(lambda row, p: p @ row), (o, i)), one)
