"""Small batches are run together, and give what each gives by itself."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ewc import Custom, _vmap
from ewc.errors import InvalidBatch
from tests import oracle
from tests.oracle import nll
from tests.support.asserts import assert_close
from tests.support.collecting import collected


class Counting(nn.Module):
    """Counts how often it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        RUNS.append(len(x))
        out: Tensor = self.net(x)
        return out


RUNS: list[int] = []


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 3).double(), torch.randint(4, (n,))) for n in sizes]


@pytest.fixture
def model() -> Counting:
    RUNS.clear()
    return Counting().double()


def expected(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    each = [oracle.empirical(model, batch, nll) for batch in data]
    return {name: sum(one[name] for one in each) for name in each[0]}


def test_small_batches_are_run_together(model: Counting) -> None:
    data = batches(*[4] * 50, 3)
    found = collected(model, data)
    assert len(RUNS) < 10
    assert found.samples == 203
    assert not found.slow
    assert_close(found.sums, expected(model, data), 1e-9)


def test_a_bundle_holds_no_more_samples_than_memory_allows(
    model: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ewc.fisher.paths.vectorised.KEPT_BYTES", {"cpu": 2**14})
    data = batches(*[4] * 50, 40, 2)
    rows: list[int] = []

    def count(layer: nn.Module, args: Any, out: Tensor) -> None:
        inner = _vmap.physical(out, 1)
        if inner is not None:
            rows.append(len(inner))

    with model.net[0].register_forward_hook(count):
        found = collected(model, data)
    assert sum(rows) == 2 + 242
    assert 4 < rows[1] <= 60
    assert 40 in rows
    assert_close(found.sums, expected(model, data), 1e-9)


def test_a_data_loader_may_reuse_its_memory(model: Counting) -> None:
    data = batches(4, 4, 4, 4, 4)
    x, y = torch.empty_like(data[0][0]), torch.empty_like(data[0][1])

    def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        torch.stack([sample[0] for sample in samples], out=x)
        torch.stack([sample[1] for sample in samples], out=y)
        return x, y

    samples = [sample for batch in data for sample in zip(*batch, strict=True)]
    loader = DataLoader(samples, batch_size=4, collate_fn=collate)
    found = collected(model, loader)
    assert len(RUNS) < 8
    assert_close(found.sums, expected(model, data), 1e-9)


def test_a_generator_may_change_what_the_model_does(model: Counting) -> None:
    data = batches(4, 4, 4, 4)
    chosen = [0.0]

    def generator() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(data):
            chosen[0] = float(number)
            yield batch

    def forward(model: nn.Module, batch: Any) -> Tensor:
        out: Tensor = model(batch[0]) * (1 + chosen[0])
        return out

    found = collected(model, generator(), forward=forward)
    each = [
        oracle.empirical(model, batch, nll, call=lambda m, b, s=s: m(b[0]) * (1 + s))
        for s, batch in enumerate(data)
    ]
    total = {name: sum(one[name] for one in each) for name in each[0]}
    assert_close(found.sums, total, 1e-9)


def test_inputs_that_require_gradients_keep_doing_so(model: Counting) -> None:
    data = batches(4, 4, 4)
    seen = set()

    def forward(model: nn.Module, batch: Any) -> Tensor:
        seen.add(_vmap.differentiable(batch[0]))
        out: Tensor = model(batch[0])
        return out

    for x, _ in data:
        x.requires_grad_()
    found = collected(model, data, forward=forward)
    assert seen == {True}
    assert_close(found.sums, expected(model, data), 1e-9)
    assert all(x.grad is None for x, _ in data)


def test_batches_with_other_shared_values_are_run_separately(model: Counting) -> None:
    data = batches(4, 4, 4, 4)
    scaled = [(x, y, float(n // 2)) for n, (x, y) in enumerate(data)]

    def forward(model: nn.Module, batch: Any) -> Tensor:
        out: Tensor = model(batch[0]) * (1 + batch[2])
        return out

    likelihood = Custom(lambda outputs, targets, scale: nll(outputs, targets))
    found = collected(model, scaled, forward=forward, likelihood=likelihood)
    each = [
        oracle.empirical(model, batch[:2], nll, call=lambda m, b, s=batch[2]: forward(m, (*b, s)))
        for batch in scaled
    ]
    total = {name: sum(one[name] for one in each) for name in each[0]}
    assert_close(found.sums, total, 1e-9)


@pytest.mark.parametrize("wrong", [0, 1, 6, 11])
def test_an_invalid_batch_is_named(model: Counting, wrong: int) -> None:
    data = batches(*[4] * 12)
    data[wrong][1][2] = 7
    with pytest.raises(InvalidBatch, match=rf"in batch {wrong} \(counted from 0\).*found 7"):
        collected(model, data)


@pytest.mark.parametrize("wrong", [0, 1, 6, 11])
@pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
def test_a_batch_that_is_not_finite_is_named(model: Counting, wrong: int, fisher_type: str) -> None:
    data = batches(*[4] * 12)
    data[wrong][0][2, 1] = torch.inf
    with pytest.raises(ValueError, match=rf"in batch {wrong} \(counted from 0\)"):
        collected(model, data, fisher_type=fisher_type)


def test_a_sum_that_overflows_is_that_of_the_last_batch() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    data = [(torch.full((2, 2), 1.2e19), torch.tensor([0, 1])) for _ in range(5)]
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ValueError, match="overflows in batch 4 "):
        collected(model, data)


def test_empty_batches_are_counted(model: Counting) -> None:
    data = batches(4, 0, 4, 0, 4)
    data[4][1][0] = -1
    with pytest.raises(InvalidBatch, match="in batch 4 "):
        collected(model, data)


def test_max_samples_reads_no_batch_too_many(model: Counting) -> None:
    data = batches(*[4] * 12)
    taken = []

    class Recorded(list[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for number, batch in enumerate(data):
                taken.append(number)
                yield batch

    found = collected(model, Recorded(data), max_samples=10)
    assert found.samples == 10
    assert taken == [0, 1, 2]
    first = [*data[:2], (data[2][0][:2], data[2][1][:2])]
    assert_close(found.sums, expected(model, first), 1e-9)
