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
