import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from ewc.errors import InvalidBatch
from ewc.likelihoods import Regression


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("variance", [1, 0.5, np.float32(0.5), torch.tensor(2), torch.rand(4) + 1])
def test_against_torch(variance: float | Tensor) -> None:
    y, t = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    spread = torch.as_tensor(variance, dtype=torch.float32).expand_as(y)
    expected = F.gaussian_nll_loss(y, t, spread, reduction="none") - spread.log() / 2
    assert_close(Regression(variance).nll(y, t), expected.sum((1, 2)))


def test_variance_follows_the_outputs_and_not_the_user() -> None:
    variance = torch.tensor([2.0, 4.0])
    likelihood = Regression(variance)
    variance.zero_()
    y = torch.randn(3, 2, dtype=torch.float64)
    assert_close(likelihood.exact_terms(y), y.T / torch.tensor([2.0, 4.0]).double().sqrt()[:, None])


def test_draws_have_the_variance() -> None:
    variance = torch.tensor([0.25, 4.0])
    drawn = Regression(variance).sample(torch.tensor([[10.0, -3.0]]).repeat(100_000, 1))
    assert_close(drawn.mean(0), torch.tensor([10.0, -3.0]), rtol=0, atol=0.03)
    assert_close(drawn.var(0), variance, rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 3), (3,), (), (6, 3, 1)])
def test_targets_are_never_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidBatch, match=r"the shape of the outputs, \[6, 3\]; found Tensor"):
        Regression().nll(torch.randn(6, 3), torch.randn(shape))


def test_targets_count_within_the_head() -> None:
    with pytest.raises(InvalidBatch, match=r"outputs in allowed_outputs, \[6, 2\]; .*\[6, 3\]"):
        Regression(allowed_outputs=[0, 2]).nll(torch.randn(6, 3), torch.randn(6, 3))


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_targets_must_be_finite(garbage: float) -> None:
    targets = torch.tensor([[0.0], [garbage]])
    for function in (Regression().nll, Regression().exact_terms):
        with pytest.raises(InvalidBatch, match="must be finite"):
            function(torch.randn(2, 1), targets)
        with pytest.raises(InvalidBatch, match="must be finite"):
            torch.func.vmap(function)(torch.randn(2, 1, 1), targets[:, None])


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, torch.tensor([1.0, 0.0])])
def test_wrong_variance(value: float | Tensor) -> None:
    with pytest.raises(ValueError, match=r"variance must be finite and > 0.*; found"):
        Regression(value)


@pytest.mark.parametrize("value", [True, "1", None, [1.0], 1j, torch.tensor([True])])
def test_no_variance(value: object) -> None:
    with pytest.raises(TypeError, match=r"variance must be finite and > 0.*; found"):
        Regression(value)


@pytest.mark.parametrize("shape", [(2,), (6, 3), (1, 1, 3), (2, 1)])
def test_variance_that_does_not_fit_one_sample(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidBatch, match=r"of one sample, \[1, 3\]; found \["):
        Regression(torch.ones(shape)).nll(torch.randn(6, 3), torch.randn(6, 3))


def test_allowed_outputs_need_a_dimension() -> None:
    with pytest.raises(InvalidBatch, match="a last dimension that allowed_outputs"):
        Regression(allowed_outputs=[0]).nll(torch.randn(3), torch.randn(3))
    with pytest.raises(InvalidBatch, match="the 3 outputs, 0 to 2; found 3"):
        Regression(allowed_outputs=[3]).nll(torch.randn(2, 3), torch.randn(2, 1))


def test_repr() -> None:
    assert repr(Regression(0.5)) == (
        "Regression(variance=0.5, allowed_outputs=None, target_transform=None)"
    )
