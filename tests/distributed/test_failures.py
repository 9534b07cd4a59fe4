"""One process fails: all raise, none hangs, all keep what they had."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from ewc import EWC, Classification, Custom, OnlineEWC
from tests.distributed.models import build, data, shard, share
from tests.distributed.workers import Workers
from tests.oracle import nll
from tests.support.asserts import unchanged

KINDS = {"EWC": EWC, "OnlineEWC": OnlineEWC}


def failing_loader(batches: list[Any], error: BaseException) -> Iterator[Any]:
    yield from batches
    raise error


class FaultError(Exception):
    pass


def fails(rank: int, world: int, where: str, sharded: bool, kind: str) -> str:
    model = build("perceptron")
    if sharded:
        shard(model, "layers")
    sizes = [5, 4, 3, 6][:world]
    batches = share(data("perceptron", sum(sizes)), rank, sizes)
    ewc = KINDS[kind](model, Classification())
    ewc.consolidate(batches)
    options: dict[str, Any] = {}
    guilty = rank == world - 1
    loader: Any = batches
    if guilty and where == "loader":
        loader = failing_loader(batches[:1], FaultError("from the loader"))
    if guilty and where == "interrupt":
        loader = failing_loader(batches[:1], KeyboardInterrupt())
    if guilty and where == "argument":
        options["dataset_size"] = -1
    if guilty and where == "label":
        loader = [(x, y + 100) for x, y in batches]
    if guilty and where == "NaN":
        loader = [*batches, (batches[0][0] * torch.nan, batches[0][1])]
    calls = 0

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if guilty and calls > 3:
            raise FaultError("from the likelihood")
        return nll(outputs, targets)

    if where == "likelihood":
        options["likelihood"] = Custom(broken)
    if where == "model":
        inner = model[2] if isinstance(model, nn.Sequential) else model
        count = 0

        def hook(module: nn.Module, args: Any) -> None:
            nonlocal count
            count += 1
            if guilty and count > 4:
                raise FaultError("from the model")

        inner.register_forward_pre_hook(hook)
    with unchanged(ewc, model):
        try:
            ewc.consolidate(loader, **options)
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        else:
            found = "nothing raised"
    assert torch.isfinite(ewc())  # and all can still talk to each other
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    "where", ["loader", "interrupt", "argument", "label", "NaN", "likelihood", "model"]
)
def test_row_46_one_rank_raises(two: Workers, where: str, sharded: bool, kind: str) -> None:
    innocent, guilty = two.run(fails, where, sharded, kind)
    expected = {
        "loader": "FaultError: from the loader",
        "interrupt": "KeyboardInterrupt",
        "argument": "ValueError: dataset_size",
        "label": "InvalidBatch: in batch 0",
        "NaN": "ValueError: Squared gradients must be finite",
        "likelihood": "FaultError: from the likelihood",
        "model": "FaultError: from the model",
    }[where]
    assert guilty.startswith(expected), guilty
    kind_of_innocent = "KeyboardInterrupt" if where == "interrupt" else "RuntimeError"
    assert innocent.startswith(f"{kind_of_innocent}: All processes must finish"), innocent
    assert f"rank 1: {expected}" in innocent, innocent


def disagrees(rank: int, world: int, what: str) -> str:
    model = build("perceptron")
    options: dict[str, Any] = {}
    if what == "strength":
        options["strength"] = 1.0 + rank
    if what == "automatic strength" and rank:
        options["strength"] = 1.0
    if what == "names" and rank:
        options["parameters"] = ["0.weight"]
    if what == "shapes" and rank:
        model[0] = nn.Linear(6, 9)
        model[2] = nn.Linear(9, 7)
    ewc = EWC(model, Classification(), **options)
    try:
        ewc.consolidate([data("perceptron", 4)])
    except ValueError as error:
        return str(error)
    return "nothing raised"


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("strength", "strength: 1.0 on rank 0; 2.0 on rank 1"),
        ("automatic strength", "strength: 'auto' on rank 0; 1.0 on rank 1"),
        ("names", "the shape of '4.bias': (5,) on rank 0; None on rank 1"),
        ("shapes", "the shape of '0.weight': (8, 6) on rank 0; (9, 6) on rank 1"),
    ],
)
def test_row_46b_ranks_that_disagree(two: Workers, what: str, part: str) -> None:
    for message in two.run(disagrees, what):
        assert part in message


def overflows(rank: int, world: int, sharded: bool) -> str:
    model = build("perceptron")
    if sharded:
        shard(model, "layers")
    ewc = OnlineEWC(model, Classification(), prior_precision=1e39)
    with unchanged(ewc, model):
        try:
            ewc.consolidate([data("perceptron", 4)])
        except ValueError as error:
            return str(error)
    return "nothing raised"


@pytest.mark.parametrize("sharded", [False, True])
def test_row_46b_a_prior_that_overflows(two: Workers, sharded: bool) -> None:
    for message in two.run(overflows, sharded):
        assert "curvature of the penalty must be finite" in message


class Wayward(nn.Module):
    """Skips a layer for some samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if bool((x.detach().sum() > self.threshold).all()):
            x = self.second(x).tanh()
        return self.head(x)

    threshold = 0.0


def goes_another_way(rank: int, world: int) -> str:
    torch.manual_seed(0)
    model = Wayward()
    for layer in (model.first, model.second, model.head):
        fully_shard(layer)
    fully_shard(model)
    x, y = data("perceptron", 8)
    ewc = EWC(model, Classification())
    with unchanged(ewc, model):
        try:
            ewc.consolidate([(x.abs() * 5, y) if rank else (-x.abs() * 5, y)])
        except RuntimeError as error:
            return str(error)
    return "nothing raised"


def test_row_46c_ranks_that_run_other_layers(two: Workers) -> None:
    for message in two.run(goes_another_way):
        assert "run the model in the same way" in message
