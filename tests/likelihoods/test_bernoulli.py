import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from ewc import EWC, Bernoulli, TimeSeries
from ewc.errors import InvalidBatch
from tests import oracle
from tests.support import asserts


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 4), (6, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.half, torch.double])
def test_against_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, targets = torch.randn(shape) * 10, torch.randint(0, 2, shape)
    expected = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    assert_close(Bernoulli().nll(logits, targets.to(dtype)), expected.reshape(6, -1).sum(1))


def test_probabilities() -> None:
    logits, p = torch.randn(6, 4).double(), torch.rand(6, 4).double()
    expected = F.binary_cross_entropy_with_logits(logits, p, reduction="none").sum(1)
    assert_close(Bernoulli().nll(logits, p), expected)


@pytest.mark.parametrize("logit", [30.0, 500.0, math.inf])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(logit: float, sign: int) -> None:
    y = torch.tensor([[sign * logit]], dtype=torch.float64, requires_grad=True)
    right = torch.tensor([[float(sign > 0)]])
    likelihood = Bernoulli()
    for found, size in (
        (likelihood.nll(y, right), math.exp(-logit)),
        (likelihood.exact_terms(y), math.exp(-logit / 2)),
    ):
        (gradient,) = torch.autograd.grad(found.sum(), y)
        assert_close(gradient.abs().item(), size, rtol=1e-12, atol=0)
    assert likelihood.nll(y, right).item() < 1e-12
    if logit < math.inf:
        (gradient,) = torch.autograd.grad(likelihood.nll(y, 1 - right).sum(), y)
        assert_close(gradient.item(), float(sign))


@pytest.mark.parametrize("bad", [-1, 2, 255, 0.5 + 1, -0.1, math.nan, math.inf])
def test_other_targets(bad: float) -> None:
    y, t = torch.randn(3, 2), torch.tensor([[0.0, 1.0], [1.0, bad], [0.0, 0.0]])
    for function in (Bernoulli().nll, Bernoulli().exact_terms):
        with pytest.raises(InvalidBatch, match="Bernoulli: targets must be 0 or 1, or prob.*mask"):
            function(y, t)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    expected = F.binary_cross_entropy_with_logits(y, torch.where(mask, t, 0), reduction="none")
    assert_close(Bernoulli().nll(y, t, mask), (expected * mask).sum(1))


@pytest.mark.parametrize("shape", [(6, 1), (1, 6), (), (6, 2), (1,)])
def test_targets_are_never_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidBatch, match=r"that Bernoulli takes must be real .*\[6\]; found"):
        Bernoulli().nll(torch.randn(6), torch.zeros(shape))


@pytest.mark.parametrize("kind", ["one", "many", "steps"])
@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
def test_the_fisher_is_that_of_single_samples(kind: str, fisher_type: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    if kind == "one":
        model = nn.Sequential(model, nn.Linear(3, 1).double(), nn.Flatten(0))
    shape = (6, 2) if kind == "steps" else (6,)
    x = torch.randn(*shape, 4).double()
    y = torch.randint(0, 2, model(x).shape)
    likelihood = TimeSeries(Bernoulli(), batch_first=True) if kind == "steps" else Bernoulli()
    ewc = EWC(model, likelihood, fisher_type=fisher_type)
    summary = ewc.consolidate([(x[:4], y[:4]), (x[4:], y[4:])])
    assert set(summary.paths.values()) == {"rule"}

    def losses(model: nn.Module, n: int) -> Tensor:
        logits = model(x[n : n + 1]).flatten()
        if fisher_type == "exact":
            # The expectation over both answers, of one question after the other.
            p = logits.detach().sigmoid()
            return torch.cat(
                [p.sqrt() * -F.logsigmoid(logits), (1 - p).sqrt() * -F.logsigmoid(-logits)]
            )
        answers = y[n : n + 1].flatten().double()
        return F.binary_cross_entropy_with_logits(logits, answers, reduction="sum")[None]

    expected = oracle.squares(model, losses, 6)
    asserts.assert_close(ewc.fisher, {name: each / 6 for name, each in expected.items()}, 1e-12)


def test_the_sampled_fisher_is_the_exact_one_on_average() -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(1, 3).double().expand(20_000, 3)
    found = [EWC(model, Bernoulli(), fisher_type=kind) for kind in ("exact", "mc")]
    for each in found:
        each.consolidate([(x,)], generator=torch.Generator().manual_seed(0))
    asserts.assert_close(found[1].fisher, found[0].fisher, 0.03)


def test_repr_and_arguments() -> None:
    assert repr(Bernoulli([1])) == "Bernoulli(allowed_outputs=(1,), target_transform=None)"
    with pytest.raises(TypeError, match="target_transform must be a function; found 3"):
        Bernoulli(target_transform=3)
    with pytest.raises(ValueError, match="allowed_outputs must be the indices"):
        Bernoulli([-1])
