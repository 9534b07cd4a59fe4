"""Likelihoods that users write: with functions, or as subclasses."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from ewc.likelihoods import Classification, Custom, Likelihood


def poisson_nll(rates: Tensor, counts: Tensor, *_: Any) -> Tensor:
    return F.poisson_nll_loss(rates, counts, reduction="none").sum(1)


def poisson_sample(rates: Tensor) -> Tensor:
    return torch.poisson(rates.exp())


class Poisson(Likelihood):
    def nll(self, outputs: Tensor, targets: Tensor, *rest: Any) -> Tensor:
        return poisson_nll(outputs, targets)

    def sample(self, outputs: Tensor) -> Tensor:
        return poisson_sample(outputs)


class Reparameterised(Likelihood):
    """A draw that carries a graph, as `rsample` does."""

    batch_dim = 1

    def nll(self, outputs: Tensor, targets: Tensor, *rest: Any) -> Tensor:
        assert not rest or rest == ("ids",)
        return 0.5 * (outputs - targets).square().sum(0)

    def sample(self, outputs: Tensor) -> Tensor:
        return outputs + 1


@pytest.mark.parametrize("likelihood", [Custom(poisson_nll, sample=poisson_sample), Poisson()])
def test_draws_take_the_place_of_targets(likelihood: Likelihood) -> None:
    rates = torch.randn(4, 3)
    torch.manual_seed(0)
    found = likelihood.sampled_nll(rates, torch.full((4, 3), 99.0), "ids")
    torch.manual_seed(0)
    assert_close(found, poisson_nll(rates, poisson_sample(rates)))
    assert_close(likelihood.nll(rates, torch.ones(4, 3)), poisson_nll(rates, torch.ones(4, 3)))


def test_no_gradient_flows_through_a_draw() -> None:
    outputs = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        Reparameterised().sampled_nll(outputs, None, "ids").sum(), outputs
    )
    assert_close(gradient, torch.full((3, 4), -1.0))


@pytest.mark.parametrize(
    ("likelihood", "mc"),
    [
        (Custom(poisson_nll), False),
        (Custom(poisson_nll, sample=poisson_sample), True),
        (Poisson(), True),
    ],
)
def test_what_is_not_defined_is_not_supported(likelihood: Likelihood, mc: bool) -> None:
    assert likelihood.supports("empirical")
    assert likelihood.supports("mc") is mc
    assert not likelihood.supports("exact")
    with pytest.raises(NotImplementedError, match=r'"exact".*Fix: define it'):
        likelihood.exact_terms(torch.zeros(1, 1))
    if not mc:
        with pytest.raises(NotImplementedError, match=r'"mc".*Custom\(nll, sample='):
            likelihood.sample(torch.zeros(1, 1))


def test_a_subclass_without_sample_says_so() -> None:
    class Bare(Likelihood):
        def nll(self, outputs: Any, *rest: Any) -> Tensor:
            raise AssertionError

    assert not Bare().supports("mc")
    with pytest.raises(NotImplementedError, match=r'Bare must define sample.*"mc"'):
        Bare().sampled_nll(torch.zeros(1))


def test_the_one_obligation() -> None:
    with pytest.raises(TypeError, match="nll"):
        Likelihood()


def test_unknown_type() -> None:
    with pytest.raises(ValueError, match=r'"empirical", "exact" or "mc"; found \'fisher\''):
        Classification().supports("fisher")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"nll": 3}, TypeError, "nll must be a function; found 3"),
        ({"nll": len, "sample": 3}, TypeError, "sample must be a function; found 3"),
        ({"nll": len, "batch_dim": "0"}, TypeError, "batch_dim must be an integer; found '0'"),
        ({"nll": len, "batch_dim": True}, TypeError, "batch_dim must be an integer; found True"),
        ({"nll": len, "batch_dim": -1}, ValueError, "batch_dim must be >= 0; found -1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Custom(**arguments)


def test_copies_pickles_and_repr() -> None:
    likelihood = Custom(poisson_nll, sample=poisson_sample, batch_dim=1)
    for other in (copy.deepcopy(likelihood), pickle.loads(pickle.dumps(likelihood))):
        assert repr(other) == repr(likelihood)
        assert other.batch_dim == 1
    assert "poisson_nll" in repr(likelihood)
