"""Processes that differ: all refuse, and say in what."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from ewc import EWC, Classification, OnlineEWC
from ewc.processes.agreement import _checksums
from tests.distributed.models import build, data, shard, share
from tests.distributed.workers import Workers
from tests.support.asserts import unchanged


def raised(ewc: EWC, model: nn.Module, call: Callable[[], Any]) -> str:
    """What a call raises; nothing has changed then, and the next consolidation works."""
    with unchanged(ewc, model):
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def one_entry(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.view(-1)[-1] += 1e-6


def in_values(rank: int, world: int, what: str, sharded: bool) -> str:
    model = build("perceptron")
    batch = data("perceptron", 4)
    prior = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    if what == "prior" and rank:
        one_entry(prior["2.weight"])
    if what == "weights" and rank:
        one_entry(model[2].weight)
    if what == "frozen":
        model[2].requires_grad_(False)
        if rank:
            one_entry(model[2].weight)
    if sharded:
        shard(model, "layers")
    ewc = OnlineEWC(model, Classification(), prior_precision=prior)
    if what in ("state", "anchor"):
        ewc.consolidate([batch])
        state = ewc.state_dict(full=True)
        if rank:
            one_entry(state["fisher" if what == "state" else "anchor"]["2.weight"])
        ewc.load_state_dict(state)
    if what == "released":
        ewc.consolidate([batch])
        if rank:
            ewc.forget("2.weight")
    if what == "likelihood" and rank:

        class Other(Classification):
            pass

        ewc._likelihood = Other()
    return raised(ewc, model, lambda: ewc.consolidate([batch]))


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("prior", "prior_precision['2.weight']: checksum"),
        ("weights", "the values of '2.weight': checksum"),
        ("frozen", "the values of '2.weight': checksum"),
        ("state", "the Fisher of '2.weight': checksum"),
        ("anchor", "the anchor of '2.weight': checksum"),
        ("released", "the constant of '2.weight': 0.0 on rank 0; None on rank 1"),
        ("likelihood", "likelihood: 'Classification' on rank 0"),
    ],
)
def test_row_46b_values_that_differ(two: Workers, what: str, part: str) -> None:
    for message in two.run(in_values, what, False):
        assert message.startswith("ValueError: Model, object and arguments must be the same")
        assert part in message
        assert message.count("  - ") == (3 if what == "released" else 1), message


@pytest.mark.parametrize("what", ["prior", "released"])
def test_row_46b_of_a_sharded_model(two: Workers, what: str) -> None:
    for message in two.run(in_values, what, True):
        assert "must be the same on every process" in message


def replicas(rank: int, world: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = build("perceptron")
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": ColwiseParallel()})
    if rank == 3:
        one_entry(model[0].weight.detach().to_local())
    ewc = EWC(model, Classification(), process_group=mesh["dp"].get_group())
    return raised(ewc, model, lambda: ewc.consolidate([data("perceptron", 4)]))


def test_replicas_of_a_shard_that_differ(four: Workers) -> None:
    for message in four.run(replicas):
        assert "the values of '0.weight': checksum" in message
        assert "on rank 1" in message
        assert "on rank 3" in message


def full_state(rank: int, world: int, what: str) -> str:
    model = build("perceptron")
    shard(model, "layers")
    ewc = EWC(model, Classification())
    batch = data("perceptron", 6)
    ewc.consolidate(share(batch, rank, [3, 3]))
    kept = model[2]
    if rank and what == "gone":
        model[2] = nn.ReLU()
    if rank and what == "released":
        ewc.forget("2.weight")
        model[2].weight.requires_grad_(False)
    found = raised(ewc, model, lambda: ewc.state_dict(full=True))
    model[2] = kept
    if what == "gone":
        assert len(ewc.state_dict(full=True)["fisher"]) == 6
    return found


def test_row_28g_a_full_state_that_one_rank_refuses(two: Workers) -> None:
    innocent, guilty = two.run(full_state, "gone")
    assert guilty.startswith("ValueError: Protected parameters must keep their names")
    assert innocent.startswith("RuntimeError: All processes must finish")
    assert "rank 1: ValueError: Protected parameters" in innocent


def test_row_28g_full_states_of_other_parameters(two: Workers) -> None:
    for message in two.run(full_state, "released"):
        assert "the state of '2.weight'" in message


class Opaque:
    """Not to be pickled: it holds a lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def unpicklable(rank: int, world: int, guilty: int, sharded: bool) -> str:
    model = build("perceptron")
    if sharded:
        shard(model, "layers")
    x, y = data("perceptron", 4)
    ewc = EWC(model, Classification(), forward=lambda m, batch: m(batch[0]))
    extra = [Opaque() if rank == guilty else "text" for _ in y]
    batches = [] if rank < guilty else [(x, y, extra)]
    found = raised(ewc, model, lambda: ewc.consolidate(batches))
    if found != "nothing":
        ewc.consolidate([(x, y)])
    return found


@pytest.mark.parametrize("guilty", [0, 1])
def test_row_46f_a_batch_that_cannot_be_pickled(two: Workers, guilty: int) -> None:
    found = two.run(unpicklable, guilty, True)
    assert found[guilty].startswith("ValueError: The first samples must be picklable")
    assert "rank" in found[1 - guilty]
    assert found[1 - guilty].startswith("RuntimeError: All processes must finish")


def test_checksums() -> None:
    """Every bit and place counts, of each dtype, contiguous or not."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(3, 4),
        torch.randn(3, 4, dtype=torch.complex64),
        torch.randn(5).bfloat16(),
        torch.randn((), dtype=torch.float64),
        torch.randint(9, (7,), dtype=torch.uint8),
        torch.randn(2**20 + 3),
        torch.empty(0),
    ]
    found = _checksums(tensors)
    assert found == _checksums([copy.deepcopy(each) for each in tensors])
    assert len(set(found)) == len(found)
    assert _checksums([tensors[0].t().contiguous().t()]) == found[:1]
    for index, tensor in enumerate(tensors[:-1]):
        other = tensor.clone()
        other.view(-1)[-1] += 1
        assert _checksums([other]) != found[index : index + 1]
    assert _checksums([tensors[5].flip(0)]) != found[5:6]
