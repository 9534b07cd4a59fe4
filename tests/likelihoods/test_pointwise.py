"""What a subclass of `Pointwise` may leave out, and what it may add."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ewc import EWC
from ewc.errors import InvalidBatch
from ewc.likelihoods import Classification, Likelihood, Pointwise, Regression, TimeSeries
from tests.likelihoods.cases import Coins, FewCoins


class Poisson(Pointwise):
    """The one obligation and nothing else."""

    def position_nll(self, head: Tensor, targets: Tensor) -> Tensor:
        return head.exp() - targets * head


@pytest.mark.parametrize("likelihood", [Poisson(), TimeSeries(Poisson())])
def test_what_is_not_defined_is_not_supported(likelihood: Likelihood) -> None:
    assert likelihood.supports("empirical")
    assert not likelihood.supports("mc")
    assert not likelihood.supports("exact")
    outputs = torch.zeros(2, 3, 4)
    with pytest.raises(NotImplementedError, match=r"Poisson must define position_sample.*Fix"):
        likelihood.sampled_nll(outputs)
    with pytest.raises(NotImplementedError, match=r"Poisson must define position_terms.*Fix"):
        likelihood.exact_terms(outputs)
    for fisher_type, method in (("exact", "position_terms"), ("mc", "position_sample")):
        with pytest.raises(ValueError, match=rf"Poisson must define {method}\(head\).*Fix"):
            EWC(torch.nn.Linear(2, 2), likelihood, fisher_type=fisher_type)


def test_what_is_defined_below_is_supported() -> None:
    assert all(TimeSeries(Coins()).supports(kind) for kind in ("empirical", "mc", "exact"))


@pytest.mark.parametrize("targets", [torch.ones(2, 1), torch.ones(2), torch.ones(2, 3) * 1j])
def test_targets_have_the_shape_of_the_head_unless_a_subclass_reads_others(targets: Tensor) -> None:
    with pytest.raises(InvalidBatch, match=r"that Poisson takes must be real .* \[2, 3\]; found"):
        Poisson().nll(torch.zeros(2, 3), targets)


def test_a_rule_of_a_subclass_is_an_error_where_positions_count() -> None:
    outputs, targets = torch.randn(2, 1, 3), torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]]])
    steps = TimeSeries(FewCoins())
    with pytest.raises(InvalidBatch, match="FewCoins: targets must be 0 or 1"):
        steps.nll(outputs, targets)
    mask = torch.tensor([[True], [False]])
    assert_close(steps.nll(outputs, targets, mask), FewCoins().nll(outputs[0], targets[0]))


def test_batches_are_taken_whole_only_by_the_class_that_says_so() -> None:
    class Derived(Classification):
        pass

    class Fast(Coins, takes_batches=True):
        pass

    assert Classification().takes_batches
    assert Regression().takes_batches
    assert TimeSeries().takes_batches
    assert TimeSeries(Fast()).takes_batches
    for likelihood in (
        Classification(target_transform=torch.abs),
        TimeSeries(Classification(target_transform=torch.abs)),
        Derived(),
        Coins(),
        TimeSeries(Derived()),
        type("Steps", (TimeSeries,), {})(),
    ):
        assert not likelihood.takes_batches
