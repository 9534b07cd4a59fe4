"""Tensor parallel on one dimension of a mesh beside data parallel on another, or on more."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from ewc import EWC, Classification, OnlineEWC
from tests import oracle
from tests.distributed.models import build, data, full, share
from tests.distributed.workers import Workers
from tests.support.versions import needs_sharding

PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def assert_right(
    ewc: EWC, model: nn.Module, expected: dict[str, Tensor], tasks: int = 1
) -> dict[str, Tensor]:
    """Fisher and penalty as on one process; returns the penalty and the Fisher to compare."""
    found = {name: full(each) for name, each in ewc.fisher.items()}
    for name, each in expected.items():
        torch.testing.assert_close(found[name].double(), tasks * each, rtol=1e-5, atol=1e-10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    moved = {name: full(p) for name, p in model.named_parameters()}
    squares = sum((tasks * expected[n] * (moved[n] / 11) ** 2).sum() for n in expected)
    penalty = 0.5 * ewc.strength * squares
    torch.testing.assert_close(ewc().detach().double(), penalty, rtol=1e-4, atol=1e-12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(1.1)
    return found | {"penalty": ewc().detach()}


def beside_data(rank: int, world: int, sizes: list[int], order: tuple[str, str]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=order)
    batch = data("perceptron", sum(sizes))
    expected = oracle.fisher(build("perceptron"), [batch])
    for kind in (EWC, OnlineEWC):
        model = build("perceptron")
        parallelize_module(model, mesh["tp"], PLAN)
        ewc = kind(model, Classification(), process_group=mesh["dp"].get_group())
        own = share(batch, mesh["dp"].get_local_rank(), sizes)
        summary = ewc.consolidate(own)
        assert summary.samples == sum(sizes)
        assert set(summary.paths.values()) == {"rule"}
        assert isinstance(ewc.fisher["0.weight"], DTensor)
        found = assert_right(ewc, model, expected)
    return found


@pytest.mark.parametrize(
    "order",
    [
        ("dp", "tp"),
        pytest.param(("tp", "dp"), marks=needs_sharding),  # PyTorch 2.6 refuses it itself
    ],
)
@pytest.mark.parametrize("sizes", [[3, 5], [0, 4]])
def test_beside_data_parallel(four: Workers, sizes: list[int], order: tuple[str, str]) -> None:
    first, *others = four.run(beside_data, sizes, order)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def on_the_whole_mesh(rank: int, world: int) -> dict[str, Any]:
    """Parameters on both dimensions, replicated over the one with the data, some on one alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    sizes = [3, 5]
    batch = data("perceptron", sum(sizes))
    model = build("perceptron")
    expected = oracle.fisher(model, [batch])
    for module, where, placements in (
        (model[0], mesh, [Replicate(), Shard(0)]),
        (model[2], mesh["tp"], [Shard(1)]),
        (model[4], mesh, [Replicate(), Replicate()]),
    ):
        weight = distribute_tensor(module.weight.detach(), where, placements)
        module.weight = nn.Parameter(weight)
    ewc = EWC(model, Classification(), process_group=mesh["dp"].get_group())
    ewc.consolidate(share(batch, mesh["dp"].get_local_rank(), sizes))
    return assert_right(ewc, model, expected)


def test_replicated_and_sharded_on_meshes_of_several_dimensions(four: Workers) -> None:
    first, *others = four.run(on_the_whole_mesh)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)
