"""Strings and other objects in a batch: they cost nothing unless they are read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc import Classification, Custom, TimeSeries
from tests import oracle
from tests.support.asserts import assert_close
from tests.support.collecting import collected
from tests.support.tasks import CLASSES, INPUTS, make_model, make_task


class Record:
    """An object without tensors."""


def keys(n: int) -> list[str]:
    return [f"sample {i}" for i in range(n)]


BATCHES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "strings": (lambda x, y: (x, y, keys(len(y))), None),
    "a tuple": (lambda x, y: (x, y, tuple(keys(len(y)))), None),
    "objects": (lambda x, y: (x, y, [Record() for _ in y]), None),
    "mappings": (lambda x, y: (x, y, [{"key": key} for key in keys(len(y))]), None),
    "mappings of tensors, unread by forward": (
        lambda x, y: {"x": x, "labels": y, "meta": [{"size": torch.ones(2)} for _ in y]},
        lambda model, batch: model(batch["x"]),
    ),
    "unread by forward": (
        lambda x, y: {"x": x, "prompt": keys(len(y)), "labels": y},
        lambda model, batch: model(batch["x"]),
    ),
    "in a nested list": (
        lambda x, y: ([x, keys(len(y))], y),
        lambda model, batch: model(batch[0][0]),
    ),
    "counted": (
        lambda x, y: (x, y, keys(len(y))),
        lambda model, batch: model(batch[0]) if len(batch[2]) else None,
    ),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
@pytest.mark.parametrize("from_generator", [True, False])
def test_objects_that_nothing_reads_cost_nothing(
    name: str, fisher_type: str, from_generator: bool
) -> None:
    make, forward = BATCHES[name]
    model, task = make_model(dtype=torch.float64), make_task(batches=3)
    task = [(x.double(), y) for x, y in task]
    batches: Any = [make(x, y) for x, y in task]
    found = collected(
        model,
        iter(batches) if from_generator else batches,
        forward=forward,
        fisher_type=fisher_type,
        generator=torch.Generator().manual_seed(0),
        max_samples=11,
    )
    assert set(found.paths.values()) == {"rule"}
    assert not found.slow
    if fisher_type == "empirical":
        expected = oracle.fisher(model, [*task[:2], (task[2][0][:3], task[2][1][:3])])
        assert_close(found.sums, {key: each * 11 for key, each in expected.items()}, 1e-12)


def test_a_custom_likelihood_need_not_read_them() -> None:
    def nll(outputs: Tensor, targets: Tensor, keys: Any) -> Tensor:
        return oracle.nll(outputs, targets)

    batches = [(x, y, keys(len(y))) for x, y in make_task()]
    assert set(collected(make_model(), batches, likelihood=Custom(nll)).paths.values()) == {"rule"}
    steps = [(x[:, None], y[:, None], keys(len(y))) for x, y in make_task()]
    likelihood = TimeSeries(Classification(target_transform=lambda t: t), batch_first=True)
    assert set(collected(make_model(), steps, likelihood=likelihood).paths.values()) == {"rule"}


READERS: dict[str, Callable[[Any], Any]] = {
    "length of each": lambda texts: [float(len(text)) for text in texts],
    "index": lambda texts: [float(len(texts[i])) for i in range(len(texts))],
    "equality": lambda texts: [float(texts == ["ccc"])] * len(texts),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("first", ["a", "bb"])
def test_objects_that_are_read_go_by_loop(name: str, first: str) -> None:
    """Also if the first samples, on which the methods are verified, do not read them."""

    def forward(model: nn.Module, batch: Any) -> Tensor:
        x, _, texts = batch
        if name != "index" or bool((x[:, 0] > 0).any()):
            scale = torch.tensor(READERS[name](texts)).to(x)
            x = x * (1 + scale[:, None])
        return model(x)

    torch.manual_seed(0)
    model = make_model(dtype=torch.float64)
    x, y = torch.randn(6, INPUTS).double(), torch.arange(6) % CLASSES
    x[:, 0] = torch.tensor([-1, -1, 1, -1, 1, 1])
    texts = [first, "bb", "ccc", "dddd", "a", "bb"]
    found = collected(model, [(x, y, texts)], forward=forward)
    assert set(found.paths.values()) == {"loop"}
    assert "lists of objects" in found.reasons["0.weight"]

    def losses(model: nn.Module, n: int) -> Tensor:
        one = slice(n, n + 1)
        return oracle.nll(forward(model, (x[one], y[one], texts[one])), y[one])

    assert_close(found.sums, oracle.squares(model, losses, 6), 1e-12)
