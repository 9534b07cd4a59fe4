"""Sharded states in checkpoints: saved on some processes, loaded on others."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ewc import EWC, Classification, OnlineEWC
from tests.distributed.models import build, data, full, shard, share
from tests.distributed.workers import Workers

KINDS = {"EWC": EWC, "OnlineEWC": OnlineEWC}
SIZES = [5, 4]


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def consolidated(rank: int, world: int, kind: str, how: str) -> EWC:
    model = build("perceptron")
    if how != "whole":
        shard(model, how)
    ewc = KINDS[kind](model, Classification(), strength=2.0)
    for seed in range(2):
        ewc.consolidate(share(data("perceptron", sum(SIZES), seed), rank, SIZES))
        moved(model)
    return ewc


def contents(ewc: EWC) -> dict[str, Any]:
    return {
        "fisher": {name: full(each) for name, each in ewc.fisher.items()},
        "anchor": {name: full(each) for name, each in ewc.anchor.items()},
        "penalty": ewc().detach(),
        "n_tasks": ewc.n_tasks,
    }


def save(rank: int, world: int, kind: str, how: str, folder: str) -> dict[str, Any]:
    ewc = consolidated(rank, world, kind, how)
    dcp.save({"ewc": ewc.state_dict()}, checkpoint_id=folder)
    return contents(ewc)


def load(rank: int, world: int, kind: str, how: str, folder: str) -> dict[str, Any]:
    return loaded(kind, how, folder)


def loaded(kind: str, how: str, folder: str) -> dict[str, Any]:
    """Into a freshly built object, of a model that is as far as the saved one was."""
    model = build("perceptron")
    for _ in range(2):
        moved(model)
    if how != "whole":
        shard(model, how)
    ewc = KINDS[kind](model, Classification(), strength=2.0)
    state = {"ewc": ewc.state_dict()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is meant to be
        dcp.load(state, checkpoint_id=folder)
    ewc.load_state_dict(state["ewc"])
    for each in (*ewc.fisher.values(), *ewc.anchor.values()):
        assert isinstance(each, DTensor) == (how != "whole")
    return contents(ewc)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["n_tasks"] == expected["n_tasks"] == 2
    assert found["penalty"] > 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_loads_anywhere(two: Workers, four: Workers, tmp_path: Path, kind: str) -> None:
    folder = str(tmp_path)
    expected = two.run(save, kind, "layers", folder)[0]
    for found in (
        *two.run(load, kind, "root", folder),
        *four.run(load, kind, "layers", folder),
        *two.run(load, kind, "whole", folder),
        loaded(kind, "whole", folder),
    ):
        assert_same(found, expected)


def test_from_whole_to_sharded(two: Workers, tmp_path: Path) -> None:
    expected = two.run(save, "EWC", "whole", str(tmp_path))[0]
    for found in two.run(load, "EWC", "layers", str(tmp_path)):
        assert_same(found, expected)


def full_state(rank: int, world: int, kind: str, path: str) -> dict[str, Any]:
    ewc = consolidated(rank, world, kind, "layers")
    state = ewc.state_dict(full=True)
    for table in ("fisher", "anchor"):
        assert all(type(each) is Tensor for each in state[table].values())
    if rank == 0:
        torch.save(state, path)
    torch.distributed.barrier()
    model = build("perceptron")
    shard(model, "root")
    other = KINDS[kind](model, Classification(), strength=2.0)
    other.load_state_dict(torch.load(path, weights_only=True))
    assert all(isinstance(each, DTensor) for each in other.fisher.values())
    for _ in range(2):
        moved(model)
    found, expected = contents(other), contents(ewc)
    assert_same(found, expected)
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_full_state_in_a_single_file(two: Workers, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ewc.pt"
    expected = two.run(full_state, kind, str(path))[0]
    model = build("perceptron")
    ewc = KINDS[kind](model, Classification(), strength=2.0)
    ewc.load_state_dict(torch.load(path, weights_only=True))
    for _ in range(2):
        moved(model)
    assert_same(contents(ewc), expected)


def sharded_afterwards(rank: int, world: int) -> None:
    model = build("perceptron")
    ewc = EWC(model, Classification(), strength=2.0)
    batch = data("perceptron", sum(SIZES))
    ewc.consolidate(share(batch, rank, SIZES))
    before = contents(ewc)
    shard(model, "layers")
    with torch.no_grad():
        assert ewc() == 0
    after = contents(ewc)
    torch.testing.assert_close(after["fisher"], before["fisher"], rtol=0, atol=0)
    ewc.consolidate(share(batch, rank, SIZES))
    for name, each in ewc.fisher.items():
        assert isinstance(each, DTensor)
        torch.testing.assert_close(full(each), 2 * before["fisher"][name])
    fully_shard(build("recurrent"))  # another model does not matter


def test_a_model_that_is_sharded_later_takes_its_state_along(two: Workers) -> None:
    two.run(sharded_afterwards)


def broken(rank: int, world: int) -> str:
    ewc = consolidated(rank, world, "EWC", "layers")
    before = contents(ewc)
    state = ewc.state_dict(full=True)
    if rank:
        state["fisher"]["0.weight"] = -state["fisher"]["0.weight"] - 1
    try:
        ewc.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
    torch.testing.assert_close(contents(ewc), before, rtol=0, atol=0)
    return found


def test_row_28c_a_state_that_one_rank_refuses(two: Workers) -> None:
    innocent, guilty = two.run(broken)
    assert guilty.startswith("ValueError: The state must fit")
    assert "must be >= 0" in guilty
    assert innocent.startswith("RuntimeError: ")
    assert "rank 1: ValueError" in innocent


def draws(rank: int, world: int, seed: int) -> dict[str, Any]:
    batch = data("perceptron", 40)
    found = {}
    for how in ("whole", "layers"):
        model = build("perceptron")
        if how != "whole":
            shard(model, how)
        ewc = EWC(model, Classification(), fisher_type="mc")
        torch.manual_seed(seed)
        ewc.consolidate([batch])  # the same samples on every process: other draws
        found[how] = {name: full(each) for name, each in ewc.fisher.items()}
        group = torch.distributed.new_subgroups(group_size=1)[0]
        alone = EWC(build("perceptron"), Classification(), fisher_type="mc", process_group=group)
        torch.manual_seed(seed)
        alone.consolidate([batch])
        found["alone"] = alone.fisher
    return found


def test_row_22_draws_differ_between_ranks_and_repeat(two: Workers) -> None:
    first, again, other = (two.run(draws, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    for how in ("whole", "layers"):
        assert not torch.equal(first[0][how]["0.weight"], other[0][how]["0.weight"])
        assert not torch.allclose(first[0][how]["0.weight"], first[0]["alone"]["0.weight"])
        torch.testing.assert_close(first[0][how], first[1][how], rtol=0, atol=0)
