"""Parameters sharded over processes: `fully_shard`, tensor parallel, and both."""

import copy
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ewc import EWC, Classification, OnlineEWC, SlowPathWarning
from ewc.fisher.sharded.model import ShardedModel
from ewc.model.names import named_parameters
from tests import oracle
from tests.distributed.models import CLASSES, MODELS, assert_whole, build, data, full, shard, share
from tests.distributed.workers import Workers
from tests.oracle import nll
from tests.support.asserts import unchanged


def equals_one_process(rank: int, world: int, name: str, how: str) -> list[str]:
    model = build(name)
    sizes = [5, 9, 0, 4][:world] if how != "root" else [6, 3, 5, 2][:world]
    batch = data(name, sum(sizes))
    expected = oracle.fisher(model, [batch])
    shard(model, how)
    paths = []
    for kind in (EWC, OnlineEWC):
        ewc = kind(model, Classification(), strength=2.0)
        with unchanged(None, model):
            summary = ewc.consolidate(share(batch, rank, sizes))
        assert summary.samples == sum(sizes)
        assert_whole(ewc.fisher, expected)
        paths = sorted({f"{key}: {path}" for key, path in summary.paths.items()})
        assert ewc().item() == 0
    return paths


@pytest.mark.parametrize("how", ["root", "layers", "nested"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_process(two: Workers, name: str, how: str) -> None:
    paths = two.run(equals_one_process, name, how)
    assert all(one == paths[0] for one in paths)
    assert not any("loop" in path for path in paths[0]), paths[0]


def test_four_equal_one_process(four: Workers) -> None:
    four.run(equals_one_process, "perceptron", "layers")


@pytest.mark.slow
def test_four_equal_one_process_on_a_transformer(four: Workers) -> None:
    four.run(equals_one_process, "attentive", "layers")


class Checkpointing(nn.Module):
    """Runs a part of the layer that it is itself again in the reverse pass."""

    use_reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.first = checkpoint_wrapper(nn.Sequential(nn.Linear(6, 7), nn.Tanh()))
        self.second = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found: Tensor = checkpoint(
            lambda x: self.second(x).tanh(), x, use_reentrant=self.use_reentrant
        )
        return found


def checkpointed(rank: int, world: int, wrapped: bool, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Checkpointing()
    batch = data("perceptron", 8)
    expected = {
        name.replace("_checkpoint_wrapped_module.", ""): each
        for name, each in oracle.fisher(model, [batch]).items()
    }
    model.use_reentrant = reentrant
    if wrapped:
        fully_shard(model.first)
    fully_shard(model)
    ewc = EWC(model, Classification(), strength=3.0)
    summary = ewc.consolidate(share(batch, rank, [5, 3]))
    assert set(summary.paths.values()) == {"rule"}
    assert_whole(ewc.fisher, expected)
    assert_trains(model.train(), ewc, batch)
    if reentrant or wrapped:  # and in the middle of training
        model(batch[0])
        ewc.consolidate([batch])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_row_40_checkpoints(two: Workers, wrapped: bool, reentrant: bool) -> None:
    two.run(checkpointed, wrapped, reentrant)


class InNumpy(nn.Module):
    """Computes what PyTorch does not see."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(np.cos(x.detach().numpy()))


def one_at_a_time(rank: int, world: int) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), InNumpy(), nn.Linear(7, CLASSES))
    batch = data("perceptron", 8)
    expected = oracle.fisher(model, [batch])
    fully_shard(model)
    ewc = EWC(model, Classification())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SlowPathWarning)
        ewc.consolidate(share(batch, rank, [5, 3]))
    assert_whole(ewc.fisher, expected)
    return [str(each.message) for each in caught if each.category is SlowPathWarning]


def test_row_41b_the_loop_is_said(two: Workers) -> None:
    for texts in two.run(one_at_a_time):
        (text,) = texts
        assert "one at a time" in text
        assert "'0.weight', '0.bias'" in text
        assert "because" in text
        assert "numpy()" in text
        assert "Fix: compute with PyTorch instead of NumPy." in text


class Selects(nn.Module):
    """The sizes of what it computes with depend on values; not for the first samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        chosen = torch.where(x[:, :3].sum(1) > x.new_tensor(0.5))[0]
        return self.last(h).index_add(0, chosen, self.last(h[chosen].tanh()))


def selecting(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model = Selects()
    inputs, targets = data("perceptron", 8)
    inputs = inputs.sort(0).values  # those of the first samples are small
    expected = oracle.fisher(model, [(inputs, targets)])
    fully_shard(model)
    ewc = EWC(model, Classification())
    ewc.consolidate(share((inputs, targets), rank, [5, 3]))
    assert_whole(ewc.fisher, expected)


def test_sizes_that_depend_on_values(two: Workers) -> None:
    two.run(selecting)


def priors(rank: int, world: int, sharded: bool) -> None:
    alone, model = build("perceptron"), build("perceptron")
    batch = data("perceptron", 8)
    shard(model, "layers")
    given = {name: torch.rand(p.shape) for name, p in build("perceptron").named_parameters()}
    parts = {
        name: distribute_tensor(given[name], p.device_mesh, p.placements)
        for name, p in model.named_parameters()
    }
    group = torch.distributed.new_subgroups(group_size=1)[0]
    one = OnlineEWC(alone, Classification(), prior_precision=given, process_group=group)
    many = OnlineEWC(model, Classification(), prior_precision=parts if sharded else given)
    one.consolidate([batch])
    many.consolidate(share(batch, rank, [5, 3]))
    many.load_state_dict(many.state_dict())
    with torch.no_grad():
        for parameter in (*alone.parameters(), *model.parameters()):
            parameter.mul_(1.1)
    torch.testing.assert_close(many(), one())


@pytest.mark.parametrize("sharded", [False, True])
def test_priors_of_tensors(two: Workers, sharded: bool) -> None:
    two.run(priors, sharded)


def with_replicas(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = build("perceptron")
    sizes = [3, 0, 4, 2]
    batch = data("perceptron", sum(sizes))
    expected = oracle.fisher(model, [batch])
    for child in model:
        if isinstance(child, nn.Linear):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ewc = EWC(model, Classification())
    assert ewc.consolidate(share(batch, rank, sizes)).samples == sum(sizes)
    assert_whole(ewc.fisher, expected)
    assert ewc.fisher["0.weight"].to_local().shape == (4, 6)


def test_sharded_within_and_replicated_across(four: Workers) -> None:
    four.run(with_replicas)


TENSOR_PARALLEL = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def tensor_parallel(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    batch = data("perceptron", 6)
    expected = oracle.fisher(build("perceptron"), [batch])
    for kind in (EWC, OnlineEWC):
        model = build("perceptron")
        parallelize_module(model, mesh["tp"], TENSOR_PARALLEL)
        ewc = kind(model, Classification())
        summary = ewc.consolidate([batch])
        assert summary.samples == 6
        assert set(summary.paths.values()) == {"rule"}
        for name, each in expected.items():
            whole = ewc.fisher[name]
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            torch.testing.assert_close(whole.double(), each, rtol=1e-5, atol=1e-10)
        assert_trains(model, ewc, batch)


def assert_trains(model: nn.Module, ewc: EWC, batch: tuple[Tensor, Tensor]) -> None:
    """Value and gradient of loss and penalty, after a step, are those of one process."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    whole = {name: full(p) for name, p in named_parameters(model).items()}
    fisher = {name: full(each) for name, each in ewc.fisher.items()}
    anchor = {name: full(each) for name, each in ewc.anchor.items()}
    expected = sum((fisher[n] * (whole[n] - anchor[n]) ** 2).sum() for n in fisher)
    expected = expected * ewc.strength / 2
    penalty = ewc()
    assert type(penalty) is Tensor
    torch.testing.assert_close(penalty.detach(), expected)
    model.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    before = {name: full(p.grad) for name, p in named_parameters(model).items()}
    model.zero_grad()
    (F.cross_entropy(model(batch[0]), batch[1]) + ewc()).backward()
    for name, parameter in named_parameters(model).items():
        gradient = ewc.strength * fisher[name] * (whole[name] - anchor[name])
        torch.testing.assert_close(full(parameter.grad), before[name] + gradient)
    model.zero_grad()


def test_tensor_parallel(two: Workers) -> None:
    two.run(tensor_parallel)


def tensor_parallel_and_sharded(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    sizes = [3, 5]
    batch = data("perceptron", sum(sizes))
    expected = oracle.fisher(build("perceptron"), [batch])
    for kind in (EWC, OnlineEWC):
        model = build("perceptron")
        parallelize_module(model, mesh["tp"], TENSOR_PARALLEL)
        for child in model:
            if isinstance(child, nn.Linear):
                fully_shard(child, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        ewc = kind(model, Classification())
        own = share(batch, mesh["dp"].get_local_rank(), sizes)
        summary = ewc.consolidate(own)
        assert summary.samples == sum(sizes)
        assert_whole(ewc.fisher, expected)
        assert_trains(model, ewc, own[0])


def test_tensor_parallel_and_sharded(four: Workers) -> None:
    four.run(tensor_parallel_and_sharded)


def mixed_precision(rank: int, world: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = build("perceptron")
    sizes = [4, 3, 2, 5][:world]
    batch = data("perceptron", sum(sizes))
    narrow = copy.deepcopy(model).bfloat16()
    expected = oracle.fisher(narrow, [(batch[0].bfloat16(), batch[1])])
    shard(model, "layers", mp_policy=policy)
    ewc = EWC(model, Classification())
    ewc.consolidate(share(batch, rank, sizes))
    for name, each in expected.items():
        found = ewc.fisher[name].full_tensor()
        assert found.dtype == torch.float32
        # Gradients in bfloat16 have eight bits; products in another order round otherwise.
        error = (found.double() - each).norm() / each.norm()
        assert error < 0.02, (name, error)


def test_mixed_precision(workers: Workers) -> None:
    workers.run(mixed_precision)


def penalty_in_training(rank: int, world: int, name: str, how: str) -> None:
    """The same steps as one process, with and without accumulation of gradients."""
    alone = build(name)
    model = build(name)
    size = 8
    batch = data(name, size * world)
    own = tuple(each[rank * size : (rank + 1) * size] for each in batch)
    shard(model, how)
    group = torch.distributed.new_subgroups(group_size=1)[0]
    one = EWC(alone, Classification(), strength=3.0, process_group=group)
    many = EWC(model, Classification(), strength=3.0)
    one.consolidate([batch])
    many.consolidate([own])
    first, second = (
        torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (alone, model)
    )
    for accumulated in (1, 1, 2):
        alone.eval()
        model.eval()
        (F.cross_entropy(alone(batch[0]), batch[1]) + one()).backward()
        for x, y in zip(*(each.chunk(accumulated) for each in own), strict=True):
            loss = F.cross_entropy(model(x), y) + many()
            (loss / accumulated).backward()
        torch.testing.assert_close(many(), one(), rtol=1e-5, atol=1e-9)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        for right_one, found in zip(alone.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(full(found), right_one.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["root", "layers"])
def test_penalty_in_training(workers: Workers, how: str) -> None:
    workers.run(penalty_in_training, "perceptron", how)


def test_penalty_in_the_training_of_a_transformer(two: Workers) -> None:
    two.run(penalty_in_training, "attentive", "layers")


def one_layer_at_a_time(rank: int, world: int) -> tuple[int, int]:
    """The most layers that were whole at a time, and the most that had whole sums of squares."""
    model = build("attentive")
    for layer in (*model.layers, model.norm):
        fully_shard(layer)
    fully_shard(model)
    ewc = EWC(model, Classification())
    whole, summing = 0, 0
    gather, add_up = ShardedModel._gather, ShardedModel._add_up

    def watched(step: Callable[..., None]) -> Callable[..., None]:
        def run(layers: ShardedModel, layer: Any) -> None:
            nonlocal whole, summing
            summing = max(
                summing,
                sum(any(s.squares is not None for s in one.placeholders) for one in layers._layers),
            )
            step(layers, layer)
            whole = max(whole, sum(one.is_gathered for one in layers._layers))

        return run

    watching = patch.multiple(ShardedModel, _gather=watched(gather), _add_up=watched(add_up))
    with watching:
        ewc.consolidate([data("attentive", 6)])
    return whole, summing


def test_no_process_holds_more_than_a_layer_whole(two: Workers) -> None:
    for whole, summing in two.run(one_layer_at_a_time):
        assert whole == 2  # the layer, and the root around it
        assert summing <= 2


def compiled(rank: int, world: int) -> None:
    model = build("perceptron")
    shard(model, "layers")
    ewc = EWC(model, Classification(), strength=3.0)
    ewc.consolidate([data("perceptron", 8)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    ewc().backward()
    expected = [full(parameter.grad) for parameter in model.parameters()]
    value = ewc().detach()
    model.zero_grad()
    found = torch.compile(lambda: ewc(), backend="aot_eager", fullgraph=True)()
    found.backward()
    torch.testing.assert_close(found.detach(), value)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(full(parameter.grad), gradient)


def test_row_45_penalty_of_a_sharded_model_compiles(two: Workers) -> None:
    two.run(compiled)


def at_a_point(rank: int, world: int) -> None:
    """Whole tensors, the same on all processes, and sharded ones."""
    model, plain = build("perceptron"), build("perceptron")
    shard(model, "layers")
    ewc, single = (EWC(each, Classification(), strength=3.0) for each in (model, plain))
    ewc.consolidate([data("perceptron", 8)])
    single.load_state_dict(ewc.state_dict(full=True))
    whole = {n: (1.1 * p).detach().requires_grad_() for n, p in plain.named_parameters()}
    expected = single(at=whole)
    gradients = torch.autograd.grad(expected, list(whole.values()))
    for penalty in (ewc, torch.compile(lambda at: ewc(at=at), backend="aot_eager")):
        value = penalty(at=whole)
        torch.testing.assert_close(value, expected)
        found = torch.autograd.grad(value, list(whole.values()))
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other)
    sharded = {n: (1.1 * p).detach().requires_grad_() for n, p in model.named_parameters()}
    value = ewc(at=sharded)
    torch.testing.assert_close(value, expected)
    value.backward()
    for one, other in zip(sharded.values(), gradients, strict=True):
        torch.testing.assert_close(full(one.grad), other)


def test_the_penalty_at_a_point(two: Workers) -> None:
    two.run(at_a_point)


def automatic_strength(rank: int, world: int) -> None:
    """The number of one process: after a consolidation, a load of either state, and a release."""
    model, plain = build("perceptron"), build("perceptron")
    shard(model, "layers")
    ewc, single = EWC(model, Classification()), EWC(plain, Classification())
    for seed in (0, 1):
        summary = ewc.consolidate([data("perceptron", 8, seed)])
        single.consolidate([data("perceptron", 8, seed)])
        assert summary.strength == ewc.strength == pytest.approx(single.strength, rel=1e-5)
    for state in (ewc.state_dict(), ewc.state_dict(full=True)):
        other = EWC(model, Classification())
        other.load_state_dict(state)
        assert other.strength == ewc.strength
    for each in (ewc, single):
        each.forget("4.weight", "4.bias")
    assert ewc.strength == pytest.approx(single.strength, rel=1e-5)
    strengths = [None] * world
    dist.all_gather_object(strengths, ewc.strength)
    assert len(set(strengths)) == 1


def test_automatic_strength(two: Workers) -> None:
    two.run(automatic_strength)


def in_the_middle_of_training(rank: int, world: int) -> None:
    """The root stays whole between forward and backward; its sharded parameter counts."""
    model = build("perceptron")
    fully_shard(model)
    expected = oracle.fisher(build("perceptron"), [data("perceptron", 8)])
    ewc = EWC(model, Classification(), strength=3.0)
    model(data("perceptron", 8)[0])
    assert not isinstance(model[0].weight, DTensor)
    ewc.consolidate([data("perceptron", 8)])
    assert_whole(ewc.fisher, expected)
    model(data("perceptron", 8)[0])
    assert ewc().item() == 0
    assert list(ewc.fisher) == list(expected)
    assert all(isinstance(each, DTensor) for each in ewc.state_dict()["fisher"].values())


def test_parameters_that_are_whole_for_a_while(two: Workers) -> None:
    two.run(in_the_middle_of_training)


class Wrapped:
    """An output that hides its tensor, so that drawn targets cannot be tried out inside vmap."""

    __slots__ = ("inner",)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner


class Opaque(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        return Wrapped(super().forward(x))


class Unwrapping(Classification):
    def sampled_nll(self, outputs: Any, *rest: Any) -> Tensor:
        return nll(outputs.inner, rest[0])  # so that the oracle knows what is "drawn"


def outputs_that_cannot_be_tried_out(rank: int, world: int) -> None:
    """Whatever was given up in the middle, no square is counted twice."""
    model = Opaque(*build("perceptron"))
    expected = oracle.fisher(nn.Sequential(*model), [data("perceptron", 6)])
    for child in model:
        if isinstance(child, nn.Linear) and child is not model[-1]:
            fully_shard(child)
    ewc = EWC(model, Unwrapping(), fisher_type="mc")
    hooks = model[-1].weight._backward_hooks
    summary = ewc.consolidate([data("perceptron", 6)])
    assert set(summary.paths.values()) == {"loop"}
    for name, each in expected.items():
        torch.testing.assert_close(full(ewc.fisher[name]).double(), each, rtol=1e-5, atol=1e-10)
    assert model[-1].weight._backward_hooks is hooks  # it is the user's own: not sharded


def test_outputs_that_cannot_be_tried_out(two: Workers) -> None:
    two.run(outputs_that_cannot_be_tried_out)


class Made(nn.Module):
    """Learned queries through layers of their own, and positions that are made of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, 6))
        self.make = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
        self.position = nn.Parameter(torch.randn(1, 6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.cat([self.position, self.position.sin(), self.position * 2])
        x = x + positions[: x.shape[1]]
        queries = self.make(self.queries).expand(len(x), -1, -1)
        return self.head(F.scaled_dot_product_attention(queries, x, x).mean(1))


def made_weights(rank: int, world: int) -> set[str]:
    torch.manual_seed(0)
    model = Made()
    batches = [
        (torch.randn(size, length, 6), torch.randint(CLASSES, (size,)))
        for size, length in ((7, 2), (3, 1))
    ]
    sums = [oracle.empirical(model, batch) for batch in batches]
    expected = {name: (one + sums[1][name]) / 10 for name, one in sums[0].items()}
    for child in (model.make, model.head, model):
        fully_shard(child)
    ewc = EWC(model, Classification())
    summary = ewc.consolidate([batches[rank]])
    assert_whole(ewc.fisher, expected)
    return set(summary.paths.values())


def test_weights_made_of_parameters_and_ranks_that_differ_in_size_and_length(two: Workers) -> None:
    assert two.run(made_weights) == [{"rule"}] * 2
