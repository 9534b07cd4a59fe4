"""What a model makes of a parameter before it meets the samples."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.collecting import collected
from tests.support.rules import Applied, check, noise

Function = Callable[[Tensor], Any]

MADE: dict[str, Function] = {
    "cast": lambda p: p.to(torch.float64),
    "as another": lambda p: p.type_as(torch.zeros((), dtype=torch.float64)),
    "copied": lambda p: p.clone().contiguous(),
    "one more": lambda p: 1 + p,
    "less": lambda p: 2 - p / 3,
    "decay": lambda p: -torch.exp(p),
    "positive": lambda p: F.softplus(p).rsqrt().sigmoid(),
    "squared": lambda p: p**2 + 0.0,
    "power": lambda p: 2**p,
    "inverse": lambda p: 1 / (p.square() + 1),
    "pruned": lambda p: p * torch.eye(4, 3, dtype=p.dtype),
    "turned": lambda p: p.t().contiguous().exp().t(),
    "folded": lambda p: (p * 2).reshape(2, 2, 3).movedim(0, 1).movedim(1, 0).flatten(0, 1),
    "like another": lambda p: p.view_as(torch.zeros(4, 3)).expand_as(torch.zeros(1, 4, 3))[0],
}


@pytest.mark.parametrize("name", MADE)
def test_made_of_a_parameter(name: str) -> None:
    x = noise(0, 5, 2, 3)
    check(Applied(lambda x, p: F.linear(x, MADE[name](p)), (4, 3)), x)


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as it is, and more": lambda x, p: x @ p + x @ (1 + p),
    "two functions": lambda x, p: (x @ p.exp()) * (x @ p.sin()),
    "turned": lambda x, p: (x @ p).tanh() @ p.t(),
    "parts that overlap": lambda x, p: F.linear(x[..., :2], p[1:, 1:]) @ p[:2].exp(),
    "scale and shift": lambda x, p: x * p[0] + p[1].exp() * x.sin() + p[1],
    "with an extra dimension": lambda x, p: x @ p + x.sin() @ p[None, :, :],
    "the whole and a row": lambda x, p: (x @ p) * p[1],
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("positions", [1, 2])
def test_used_in_several_ways(name: str, positions: int) -> None:
    check(Applied(USES[name], (3, 3)), noise(0, 5, positions, 3))


WRITTEN: dict[str, Function] = {
    "in place": lambda w: w.mul_(2),
    "into a part": lambda w: w[0].zero_(),
    "by an index": lambda w: w.__setitem__(slice(1, 2), 0.5),
    "by a mask": lambda w: w.masked_fill_(torch.eye(3).bool(), 0),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_the_model_writes_into_is_not_taken_for_the_parameter(name: str) -> None:
    def pruned(x: Tensor, p: Tensor) -> Tensor:
        w = p.clone()
        WRITTEN[name](w)
        return F.linear(x, w)

    check(Applied(pruned, (3, 3)), noise(0, 5, 3))


def test_written_into_without_a_gradient() -> None:
    def masked(x: Tensor, p: Tensor) -> Tensor:
        w = p.sin()
        with torch.no_grad():
            w[0] = 0
        return x * (w * w.detach())

    check(Applied(masked, (3,)), noise(0, 5, 3), path=None)


ALONE: dict[str, Function] = {
    "with itself": lambda p: p * p,
    "normalised": lambda p: F.normalize(p),
    "stacked": lambda p: torch.stack([p[0], p[1].exp()]),
    "expanded": lambda p: p[:1].expand(4, 3),
    "as large as another": lambda p: p[0] + torch.zeros(4, 3).double(),
    "padded": lambda p: torch.cat([p.sin()[:2].chunk(2)[0], torch.zeros(3, 3).double()]),
    "its own product": lambda p: torch.mv(p, torch.ones(3).double()).unsqueeze(1) - p.exp(),
}


@pytest.mark.parametrize("name", ALONE)
def test_functions_of_parameters_alone_are_exact(name: str) -> None:
    x = noise(0, 5, 2, 3)
    check(Applied(lambda x, p: x @ ALONE[name](p).mT, (4, 3)), x)


def test_a_parameter_read_by_strides_is_exact() -> None:
    def read(x: Tensor, p: Tensor) -> Tensor:
        return x @ p.mT + 0.1 * p.as_strided((4,), (2,))

    check(Applied(read, (4, 3)), noise(0, 5, 2, 3))


def test_an_option_that_a_rule_does_not_know_concerns_one_parameter_alone() -> None:
    def add(x: Tensor, w: Tensor, p: Tensor) -> Tensor:
        return (x * w).add_(p, alpha=2)

    net = Applied(add, (3,), (3,))
    check(net, noise(0, 5, 3), path=None)
    paths = collected(net, [(noise(0, 5, 3), torch.zeros(5).long())]).paths
    assert paths == {"values.0": "rule", "values.1": "vmap"}
