"""Empirical, exact and sampled Fisher, for every likelihood, against enumeration by hand."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc import Custom, Regression, TimeSeries
from tests import oracle
from tests.support.asserts import assert_close
from tests.support.collecting import collected


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


class Recurrent(nn.Module):
    """Time first, `[S, N, F]`."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.lstm(x)[0])


def test_exact_classification_is_the_expectation_over_classes() -> None:
    net, x = model(), torch.randn(5, 3).double()

    def losses(net: nn.Module, n: int) -> Tensor:
        log_p = net(x[n : n + 1]).log_softmax(1)[0]
        return log_p.detach().exp().sqrt() * -log_p

    found = collected(net, [(x,)], fisher_type="exact")
    assert_close(found.sums, oracle.squares(net, losses, 5), 1e-9)
    bare = collected(net, [x[:2], x[2:]], fisher_type="exact")
    assert_close(bare.sums, oracle.squares(net, losses, 5), 1e-9)


def test_exact_regression_with_a_variance_per_output() -> None:
    net, x = model(), torch.randn(5, 3).double()
    variance = torch.tensor([0.5, 1.0, 2.0, 4.0]).double()

    def losses(net: nn.Module, n: int) -> Tensor:
        return net(x[n : n + 1])[0] / variance.sqrt()

    found = collected(net, [(x,)], fisher_type="exact", likelihood=Regression(variance))
    assert_close(found.sums, oracle.squares(net, losses, 5), 1e-9)


def test_empirical_regression() -> None:
    net, x, y = model(), torch.randn(5, 3).double(), torch.randn(5, 4).double()
    found = collected(net, [(x, y)], likelihood=Regression(0.3))
    expected = oracle.empirical(net, (x, y), lambda out, t: ((out - t) ** 2).sum(1) / 0.6)
    assert_close(found.sums, expected, 1e-9)


@pytest.mark.parametrize("batch_first", [False, True])
def test_time_series_with_a_mask(batch_first: bool) -> None:
    torch.manual_seed(2)
    net = Recurrent().double()
    x, y = torch.randn(4, 5, 3).double(), torch.randint(3, (4, 5))
    mask = torch.rand(4, 5) > 0.3
    mask[:, 0] = False

    def losses(net: nn.Module, n: int) -> Tensor:
        out = net(x[:, n : n + 1])[:, 0]
        each = F.cross_entropy(out, y[:, n], reduction="none")
        return (each * mask[:, n]).sum().reshape(1)

    expected = oracle.squares(net, losses, 5)
    batch: Any = (x, y, mask)
    forward = None
    if batch_first:
        batch = tuple(each.transpose(0, 1).contiguous() for each in batch)

        def forward(net: nn.Module, batch: Any) -> Tensor:
            return net(batch[0].transpose(0, 1)).transpose(0, 1)

    likelihood = TimeSeries(batch_first=batch_first)
    found = collected(net, [batch], likelihood=likelihood, forward=forward)
    assert_close(found.sums, expected, 1e-9)


def test_exact_time_series_squares_single_positions() -> None:
    torch.manual_seed(2)
    net, x = Recurrent().double(), torch.randn(4, 5, 3).double()

    def losses(net: nn.Module, n: int) -> Tensor:
        log_p = net(x[:, n : n + 1])[:, 0].log_softmax(1)
        return (log_p.detach().exp().sqrt() * -log_p).flatten()

    found = collected(net, [(x,)], likelihood=TimeSeries(), fisher_type="exact")
    assert_close(found.sums, oracle.squares(net, losses, 5), 1e-9)


def test_sampled_fisher_tends_to_the_exact_one() -> None:
    net, x = model(), torch.randn(4, 3).double()
    exact = collected(net, [(x,)], fisher_type="exact")
    many = x.repeat(2000, 1)
    sampled = collected(
        net, many.split(500), fisher_type="mc", generator=torch.Generator().manual_seed(0)
    )
    for name, expected in exact.sums.items():
        error = (sampled.sums[name] / 2000 - expected).norm() / expected.norm()
        assert error < 0.1, name


def test_the_same_seed_draws_the_same_targets() -> None:
    net, x = model(), torch.randn(6, 3).double()
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        runs.append(collected(net, [(x,)], fisher_type="mc", generator=generator))
    again = collected(net, [(x,)], fisher_type="mc", generator=generator)
    for name in runs[0].sums:
        assert torch.equal(runs[0].sums[name], runs[1].sums[name])
        assert not torch.equal(runs[0].sums[name], again.sums[name])


def test_samples_of_a_batch_draw_independently() -> None:
    net = nn.Linear(2, 2, bias=False).double()
    nn.init.zeros_(net.weight)  # both classes are equally likely
    x = torch.eye(2).repeat(200, 1).double()

    def sample(outputs: Tensor) -> Tensor:
        return torch.bernoulli(torch.full_like(outputs[:, 0], 0.5)).long()

    def nll(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none") * (1 + targets)

    found = collected(net, [x], fisher_type="mc", likelihood=Custom(nll, sample=sample))
    mean = found.sums["weight"].sum().item() / 400
    assert math.isclose(mean, 0.5 * (1 + 4) / 2, rel_tol=0.2)


def test_max_samples_cuts_the_last_batch() -> None:
    net, x, y = model(), torch.randn(10, 3).double(), torch.randint(4, (10,))
    batches = list(zip(x.split(4), y.split(4), strict=True))
    found = collected(net, batches, max_samples=6)
    assert (found.samples, found.truncated) == (6, True)
    assert_close(found.sums, collected(net, [(x[:6], y[:6])]).sums, 1e-12)
    whole = collected(net, batches, max_samples=10)
    assert (whole.samples, whole.truncated) == (10, False)
    assert collected(net, batches, max_samples=8).truncated


def test_probability_targets_square_the_gradient_of_the_expectation() -> None:
    net, x = model(), torch.randn(5, 3).double()
    y = torch.rand(5, 4).double()
    y = y / y.sum(1, keepdim=True)
    found = collected(net, [(x, y)])
    expected = oracle.empirical(net, (x, y), lambda out, t: -(t * out.log_softmax(1)).sum(1))
    assert_close(found.sums, expected, 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    net, x, y = model(), torch.randn(16, 3), torch.randint(4, (16,))
    exact = collected(net, [(x.double(), y)])
    found = collected(net.to(dtype), [((1 * x).to(dtype), y)])
    for name, expected in exact.sums.items():
        assert found.sums[name].dtype == torch.float32
        assert (found.sums[name].double() - expected).norm() < 0.05 * expected.norm()
    tiny = collected(net, [((1e-3 * x).to(dtype), y)])
    assert (tiny.sums["0.weight"] > 0).all(), "squares underflow"
