"""What follows the targets in a batch: masks, what is ignored, and what is refused."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc import EWC, Classification, Custom, Likelihood, Regression, TimeSeries
from ewc.errors import InvalidBatch
from tests import oracle
from tests.support.asserts import assert_close

N, CLASSES = 5, 3


class Objects:
    """Something without tensors."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fisher(likelihood: Likelihood, batch: Any, **options: Any) -> dict[str, Tensor]:
    """The Fisher information of a linear model."""
    ewc = EWC(model(), likelihood, **options)
    ewc.consolidate([batch])
    return dict(ewc.fisher)


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, CLASSES, dtype=torch.float64)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, 4, dtype=torch.float64)


def expected(batch: tuple[Tensor, ...], nll: Any, dim: int = 0) -> dict[str, Tensor]:
    """The mean over the samples, by the oracle."""
    sums = oracle.empirical(model(), batch, nll, dim)
    return {name: each / batch[-1].shape[dim] for name, each in sums.items()}


class TestMasks:
    def test_of_samples(self) -> None:
        x, y, mask = inputs(N), torch.randint(CLASSES, (N,)), torch.tensor([1, 0, 1, 1, 0]).bool()
        garbled = torch.where(mask, y, 99)

        def nll(outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            return oracle.nll(outputs, y) * mask

        found = fisher(Classification(), (x, garbled, mask))
        assert_close(found, expected((x, y, mask), nll), 1e-12)
        ids = torch.arange(N)
        assert_close(fisher(Classification(), (x, garbled, ids, mask, ["key"] * N)), found, 1e-12)

    def test_of_outputs(self) -> None:
        x, y, mask = inputs(N), torch.randn(N, CLASSES).double(), torch.rand(N, CLASSES) < 0.5

        def nll(outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            return (0.5 * (outputs - y).square() * mask).sum(1)

        garbled = torch.where(mask, y, math.nan)
        assert_close(fisher(Regression(), (x, garbled, mask)), expected((x, y, mask), nll), 1e-12)

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_of_outputs_of_steps(self, batch_first: bool) -> None:
        shape = (N, 3) if batch_first else (3, N)
        x, y = inputs(*shape), torch.randn(*shape, CLASSES).double()
        mask = torch.rand(*shape, CLASSES) < 0.5

        def nll(outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            return (0.5 * (outputs - y).square() * mask).sum()[None]

        found = fisher(TimeSeries(Regression(), batch_first=batch_first), (x, y, mask))
        dim = 0 if batch_first else 1
        assert_close(found, expected((x, y, mask), nll, dim), 1e-12)

    @pytest.mark.parametrize("fisher_type", ["exact", "mc"])
    @pytest.mark.parametrize("given", [True, False])
    def test_without_targets_in_the_data(self, fisher_type: str, given: bool) -> None:
        x, mask = inputs(N), torch.tensor([1, 0, 1, 1, 0]).bool()
        targets = torch.where(mask, 1, 99) if given else None
        options = {"fisher_type": fisher_type}
        found = fisher(Classification(), (x, targets, mask), **options)
        if fisher_type == "exact":
            kept = fisher(Classification(), (x[mask],), **options)
            assert_close(found, {name: each * 3 / 5 for name, each in kept.items()}, 1e-12)
        nothing = (x, targets, torch.zeros(N).bool())
        with pytest.raises(ValueError, match="every parameter is zero"):
            fisher(Classification(), nothing, **options)


IGNORED = [
    torch.arange(N),
    torch.arange(N).to(torch.uint8),
    torch.tensor(3),
    torch.tensor(0.5),
    torch.tensor(True),
    3,
    0.5,
    True,
    None,
    "task",
    ["key"] * N,
    [0, 1, 2, 3, 4],
    {"path": ["p"] * N, "index": torch.arange(N)},
    [Objects() for _ in range(N)],
]


@pytest.mark.parametrize("extra", IGNORED, ids=lambda extra: type(extra).__name__)
@pytest.mark.parametrize("likelihood", [Classification(), TimeSeries(batch_first=True)], ids=str)
def test_what_cannot_change_the_likelihood_is_ignored(likelihood: Likelihood, extra: Any) -> None:
    shape = (N,) if isinstance(likelihood, Classification) else (N, 2)
    x, y = inputs(*shape), torch.randint(CLASSES, shape)
    assert_close(fisher(likelihood, (x, y, extra)), fisher(likelihood, (x, y)), 1e-12)


REFUSED = [
    torch.rand(N),
    torch.rand(N, CLASSES),
    torch.rand(N, 1),
    torch.ones(N, CLASSES).int(),
    torch.ones(N, 1).bool(),
    torch.ones(N, 7).bool(),
    [0.5] * N,
    [True] * N,
    {"weight": torch.rand(N)},
]


@pytest.mark.parametrize("extra", REFUSED, ids=lambda extra: type(extra).__name__)
@pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
@pytest.mark.parametrize("place", [0, 1])
def test_what_may_change_the_likelihood_is_refused(
    extra: Any, fisher_type: str, place: int
) -> None:
    extras = [torch.arange(N)] * place + [extra]
    with pytest.raises(InvalidBatch, match=r"boolean mask \[\d\].*Fix: ") as error:
        fisher(
            Classification(),
            (inputs(N), torch.randint(CLASSES, (N,)), *extras),
            fisher_type=fisher_type,
        )
    assert f"as rest[{place + 1}]" in str(error.value)


def test_all_that_is_wrong_is_named_at_once() -> None:
    x, y = inputs(N), torch.randn(N, CLASSES).double()
    with pytest.raises(
        InvalidBatch, match=r"float32 as rest\[1\], Tensor\[5, 1\] int64 as rest\[3\]"
    ):
        fisher(Regression(), (x, y, torch.rand(N), torch.arange(N), torch.ones(N, 1).long()))


@pytest.mark.parametrize("extra", [torch.rand(N), torch.rand(N, 2, 1), torch.ones(N, 2, 4).bool()])
def test_weights_of_whole_sequences_are_refused(extra: Tensor) -> None:
    batch = (inputs(N, 2), torch.randint(CLASSES, (N, 2)), extra)
    with pytest.raises(InvalidBatch, match="what follows the targets"):
        fisher(TimeSeries(batch_first=True), batch)


def test_each_way_out_works() -> None:
    x, y, weights = inputs(N), torch.randint(CLASSES, (N,)), torch.rand(N)
    loader = [(x, y, weights)]
    without = [(x, y) for x, y, *_ in loader]
    assert_close(fisher(Classification(), without[0]), expected((x, y), oracle.nll), 1e-12)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.inner(x) * scale[:, None]

    net = Scaled()
    ewc = EWC(net, Classification())
    ewc.consolidate(((x, extra), y) for x, y, extra in loader)
    sums = oracle.empirical(net, ((x, weights), y))
    assert_close(ewc.fisher, {name: each / N for name, each in sums.items()}, 1e-12)

    mask = (weights > 0.5).long()
    ways = {
        "mask": (Classification(), (x, y, mask.bool())),
        "weights": (
            Custom(lambda outputs, y, weights: weights * Classification().nll(outputs, y)),
            (x, y, mask.double()),
        ),
    }
    found = [fisher(likelihood, batch) for likelihood, batch in ways.values()]
    assert_close(found[0], found[1], 1e-12)
    assert_close(
        found[0],
        expected((x, y, mask), lambda o, y, m: F.cross_entropy(o, y, reduction="none") * m),
        1e-12,
    )
