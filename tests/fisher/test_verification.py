"""The reasons for the loop that the verification gives."""

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc import Custom
from tests import oracle
from tests.support.collecting import collected

pytestmark = pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning")


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.randint(3, (6,))


class Drawing(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.mean, self.head, self.draw = nn.Linear(4, 5), nn.Linear(5, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.draw(self.mean(x)))
        return outputs


@pytest.mark.parametrize(
    "draw",
    [
        lambda h: h + torch.randn_like(h),  # a VAE
        lambda h: h + torch.randn(h.shape),
        lambda h: F.dropout(h, 0.5, True),
        lambda h: h * torch.randint(1, 9, (len(h), 1)),  # the step of a diffusion model
        lambda h: h * random.random(),
        lambda h: h * np.random.rand(),
    ],
    ids=["randn_like", "randn", "dropout", "randint", "random", "numpy"],
)
def test_the_reason_names_random_numbers(draw: Any) -> None:
    found = collected(Drawing(draw), [data()])
    assert set(found.paths.values()) <= {"loop", "rule"}
    assert all("draws random numbers" in reason for reason in found.reasons.values())


def test_the_reason_names_random_numbers_of_the_likelihood() -> None:
    likelihood = Custom(lambda outputs, targets: oracle.nll(F.dropout(outputs, 0.5), targets))
    found = collected(nn.Linear(4, 3), [data()], likelihood=likelihood)
    assert all("draws random numbers" in reason for reason in found.reasons.values())


def seeded(h: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return h * (torch.rand(5, generator=generator) > 0.5)


def permuted(h: Tensor) -> Tensor:
    return h[:, torch.randperm(5, generator=torch.Generator().manual_seed(3))]


def filled(h: Tensor) -> Tensor:
    noise = torch.empty_like(h[:1]).normal_(generator=torch.Generator().manual_seed(0))
    return h + noise


def reseeded(h: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return h + torch.randn(5)


def late(h: Tensor) -> Tensor:
    return seeded(h) if bool((h[:, 0] > 0.5).any()) else h


@pytest.mark.parametrize("draw", [seeded, permuted, filled, reseeded, late])
@pytest.mark.parametrize("sizes", [[6], [2, 4], [1, 5], [1, 2, 3]])
def test_draws_that_are_the_same_in_every_run(draw: Any, sizes: list[int]) -> None:
    """Each sample alone has the same numbers; `vmap` draws others for each."""
    torch.manual_seed(0)
    net, (x, y) = Drawing(draw).double(), (data()[0].double(), data()[1])
    with torch.no_grad():
        x = x[net.mean(x)[:, 0].argsort()]
    batches = zip(x.split(sizes), y.split(sizes), strict=True)
    found = collected(net, iter(batches))

    def losses(net: nn.Module, n: int) -> Tensor:
        return oracle.nll(net(x[n : n + 1]), y[n : n + 1])

    for name, expected in oracle.squares(net, losses, 6).items():
        torch.testing.assert_close(found.sums[name].double(), expected, rtol=1e-9, atol=1e-12)
