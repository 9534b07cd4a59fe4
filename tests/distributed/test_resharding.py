"""`fully_shard(..., reshard_after_forward=<int>)`: after a forward, parameters lie otherwise.

Between forward and backward, and after a forward without one, the modules then hold parameters that
are sharded over a part of the processes. Optimizers know the others.
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from ewc import EWC, Classification, OnlineEWC
from tests import oracle
from tests.distributed.models import assert_whole, build, data, full, share
from tests.distributed.workers import Workers


def sharded(name: str, how: str, reshard: int | bool, mesh: Any) -> nn.Module:
    model = build(name)
    options = {"mesh": mesh, "reshard_after_forward": reshard}
    if how == "nested":  # an inner layer inside an outer one, with other settings than the root
        fully_shard(model[0], **options)
        fully_shard(model[2], **{**options, "reshard_after_forward": True})
    fully_shard(model, **options)
    return model


def trains(rank: int, world: int, how: str, reshard: int | bool, replicas: int) -> None:
    """Value, gradient and steps as on one process, with the penalty taken after the forward.

    Replicas, if any, are the first dimension of the mesh.
    """
    mesh = None
    if replicas:
        shape = (replicas, world // replicas)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    for kind in (EWC, OnlineEWC):
        alone, model = build("perceptron"), sharded("perceptron", how, reshard, mesh)
        batch = data("perceptron", 4 * world)
        sizes = [4] * world
        own = share(batch, rank, sizes)
        inputs, targets = (each[4 * rank : 4 * rank + 4] for each in batch)
        ewc = kind(model, Classification(), strength=3.0)
        model(inputs)  # parameters lie otherwise before the object binds to them, too
        ewc.consolidate(own)
        expected = oracle.fisher(build("perceptron"), [batch])
        assert_whole(ewc.fisher, expected)
        first, second = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (alone, model))
        anchor = copy.deepcopy(alone.state_dict())
        for _ in range(3):
            penalty = sum(
                (expected[n] * (p - anchor[n]) ** 2).sum() for n, p in alone.named_parameters()
            )
            penalty = 1.5 * penalty
            (F.cross_entropy(alone(batch[0]), batch[1]) + penalty).backward()
            outputs = model(inputs)
            found = ewc()
            torch.testing.assert_close(found.detach().double(), penalty.detach())
            (F.cross_entropy(outputs, targets) + found).backward()
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
            for right, one in zip(alone.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(full(one), right.detach(), rtol=1e-5, atol=1e-6)
        model(inputs)
        state = ewc.state_dict(full=True)
        for name, each in expected.items():
            torch.testing.assert_close(state["fisher"][name].double(), each, rtol=1e-5, atol=1e-9)
        other = kind(sharded("perceptron", how, reshard, mesh), Classification(), strength=3.0)
        other.load_state_dict(state)
        assert_whole(other.fisher, expected)


@pytest.mark.parametrize(
    ("how", "reshard", "replicas"),
    [
        ("nested", 2, 0),
        ("nested", 2, 2),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("root", 2, 0), ("nested", 2, 1), ("nested", False, 0))
        ),
    ],
)
def test_trains_as_one_process(four: Workers, how: str, reshard: int | bool, replicas: int) -> None:
    four.run(trains, how, reshard, replicas)


def test_as_over_all_processes(two: Workers) -> None:
    two.run(trains, "root", 1, 0)


def compiled(rank: int, world: int) -> None:
    model = sharded("perceptron", "root", 2, None)
    batch = data("perceptron", 8)
    ewc = EWC(model, Classification(), strength=3.0)
    ewc.consolidate([batch])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    value = ewc().detach()
    model(batch[0])
    found = torch.compile(lambda: ewc(), backend="aot_eager")()
    torch.testing.assert_close(found.detach(), value)
    found.backward()
    step = torch.compile(lambda x: model(x).sum() * 0 + ewc(), backend="aot_eager")
    torch.testing.assert_close(step(batch[0]).detach(), value)


@pytest.mark.slow
def test_row_45_compiles(four: Workers) -> None:
    four.run(compiled)
