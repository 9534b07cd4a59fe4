"""Likelihoods that compare samples are refused; those that do not are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc import EWC, Classification, Custom, Likelihood
from tests import oracle
from tests.oracle import nll
from tests.support.asserts import assert_close, raises, unchanged

TYPES = ["empirical", "mc"]


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """The sigmoid loss of all pairs."""
    rows = F.normalize(outputs, dim=1)
    signs = 2 * torch.eye(len(rows)) - 1
    return F.softplus(-signs * (rows @ rows.t())).sum(1)


def in_batch_negatives(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs @ outputs.t(), torch.arange(len(outputs)), reduction="none") + (
        nll(outputs, targets)
    )


def rolled_negatives(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.softplus((outputs * outputs.roll(1, 0)).sum(1))


def class_weights(outputs: Tensor, targets: Tensor) -> Tensor:
    counts = torch.bincount(targets, minlength=3).clamp(min=1)
    return nll(outputs, targets) * (len(targets) / (3 * counts))[targets]


def class_weights_of_those_present(outputs: Tensor, targets: Tensor) -> Tensor:
    """All 1 for two samples of different classes, as for one sample."""
    same = (targets[:, None] == targets).sum(1)
    return nll(outputs, targets) * len(targets) / ((1 / same).sum() * same)


def baseline(outputs: Tensor, targets: Tensor) -> Tensor:
    values = nll(outputs, targets)
    return values * (1 + values.detach().mean())


COMPARING = [
    contrastive,
    in_batch_negatives,
    rolled_negatives,
    class_weights,
    class_weights_of_those_present,
    baseline,
]


def drawn(outputs: Tensor) -> Tensor:
    return torch.randint(3, (len(outputs),))


class Subclass(Likelihood):
    """A function as a subclass."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.wrapped = function

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.wrapped(outputs, targets)

    def sample(self, outputs: Tensor) -> Tensor:
        return drawn(outputs)


def custom(function: Callable[..., Tensor]) -> Custom:
    return Custom(function, sample=drawn)


def data() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    # The first two targets are equal: classes are compared only where they differ.
    return net, torch.randn(6, 4), torch.tensor([1, 1, 0, 2, 1, 0])


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("make", [Subclass, custom])
@pytest.mark.parametrize("function", COMPARING)
def test_a_likelihood_that_compares_samples(
    function: Callable[..., Tensor], make: Any, fisher_type: Any
) -> None:
    net, x, y = data()
    ewc = EWC(net, make(function), fisher_type=fisher_type)
    name = f"Custom.nll ({function.__name__})" if make is custom else "Subclass.nll"
    parts = ("the other samples of its batch", f"found that {name} compares them", "[1, B, d]")
    with unchanged(ewc, net), raises(ValueError, *parts):
        ewc.consolidate([(x, y)])


@pytest.mark.parametrize("read_ahead", [True, False], ids=["list", "generator"])
def test_samples_are_compared_after_a_first_batch_of_one(read_ahead: bool) -> None:
    net, x, y = data()
    ewc = EWC(net, Custom(class_weights))
    batches = list(zip(x.split([1, 5]), y.split([1, 5]), strict=True))
    with unchanged(ewc, net), raises(ValueError, "the other samples of its batch"):
        ewc.consolidate(batches if read_ahead else iter(batches))


def test_exact_terms_that_compare_samples() -> None:
    class Centred(Subclass):
        def exact_terms(self, outputs: Tensor, *rest: Any) -> Tensor:
            return (outputs - outputs.mean(0, keepdim=True)).t()

    net, x, y = data()
    with raises(ValueError, "Centred.exact_terms compares them"):
        EWC(net, Centred(nll), fisher_type="exact").consolidate([(x, y)])


def test_a_transform_of_targets_that_compares_samples() -> None:
    net, x, y = data()
    likelihood = Classification(target_transform=lambda t: (t + t.sum()) % 3)
    with raises(ValueError, "Classification.nll compares them"):
        EWC(net, likelihood).consolidate([(x, y)])


def test_outputs_that_cannot_be_divided() -> None:
    class Density(nn.Linear):
        def forward(self, x: Tensor) -> torch.distributions.Distribution:
            return torch.distributions.Normal(super().forward(x), 1.0)

    _, x, y = data()
    for function, is_comparing in (
        (lambda density, y: -density.log_prob(density.mean.mean(0).detach() + 1).sum(1), True),
        (lambda density, y: -density.log_prob(y[:, None].float()).sum(1), False),
    ):
        ewc = EWC(Density(4, 3), Custom(function))
        if is_comparing:
            with raises(ValueError, "compares them"):
                ewc.consolidate([(x, y)])
        else:
            assert set(ewc.consolidate([(x, y)]).paths.values()) == {"rule"}


def test_several_samples_as_one() -> None:
    """The way out that the message names."""
    net, x, _ = data()
    pairs = torch.randn(4, 5, 4)

    def loss(outputs: Tensor) -> Tensor:
        rows = F.normalize(outputs, dim=-1)
        signs = 2 * torch.eye(5).to(rows) - 1
        return F.softplus(-signs * (rows @ rows.mT)).sum((1, 2))

    ewc = EWC(net, Custom(loss))
    summary = ewc.consolidate([(pairs,)])
    assert summary.samples == 4
    expected = oracle.empirical(net, (pairs,), loss)
    assert_close(ewc.fisher, {name: each / 4 for name, each in expected.items()}, 1e-4)


class Counting(Likelihood):
    """Its values change from call to call."""

    def __init__(self) -> None:
        self.calls = 0

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return nll(outputs, targets) * (1 + 1 / self.calls)


def of_one_only(outputs: Tensor, targets: Tensor) -> Tensor:
    assert len(outputs) == 1
    return nll(outputs, targets)


INDEPENDENT = {
    "plain": Custom(nll),
    "reduced, of one": Custom(lambda outputs, targets: nll(outputs, targets).mean().reshape(1)),
    "by the number of samples": Custom(lambda o, t: nll(o, t) / len(o)),
    "rounded": Custom(lambda o, t: (nll(o, t) + 1e6) - 1e6 + nll(o, t)),
    "of one only": Custom(of_one_only),
    "fitted": Custom(lambda o, t: nll(100 * o.detach() + o, o.argmax(1))),
    "random": Custom(lambda o, t: nll(F.dropout(o, 0.1), t)),
    "random, as values require": Custom(
        lambda o, t: nll(o, t) * (1 + torch.poisson(o.detach().exp()).sum(1) + torch.rand(len(o)))
    ),
    "state": Counting(),
}


@pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning", "ignore::ewc.ZeroFisherWarning")
@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_likelihood_of_independent_samples(name: str) -> None:
    net, x, y = data()
    assert EWC(net, INDEPENDENT[name]).consolidate([(x, y)]).samples == 6
    assert EWC(net, INDEPENDENT[name]).consolidate([(x[:1], y[:1])]).samples == 1
