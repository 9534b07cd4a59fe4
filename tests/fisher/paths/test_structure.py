"""Weights that depend on their parameters in another way in each batch."""

import gc
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc import EWC, Classification
from tests import oracle
from tests.support.fisher import TYPES, data, double, holds
from tests.support.rules import Applied

pytestmark = pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning")

MASKS = torch.tensor(
    [[[1.0, 0, 1], [0, 1, 0]], [[1, 1, 0], [0, 1, 1]], [[1, 0, 0], [0, 1, 1]]], dtype=torch.float64
)


def copied_rows(p: Tensor, task: int) -> Tensor:
    index = torch.tensor([[0, 1, 2], [0, 0, 1]][task % 2])
    rows = p.index_select(0, index)
    del index  # its memory is free for that of another batch
    return rows


def written(p: Tensor, task: int) -> Tensor:
    w = torch.zeros(3, 3).double()
    w[:2], w[task : task + 2] = p[:2], p[:2]
    return w


SHARED = torch.zeros(2).double()


def masked_past_its_version(p: Tensor, task: int) -> Tensor:
    SHARED.numpy()[:] = 1, task
    return (SHARED[:, None, None] * p).flatten(0, 1)


def hooked(p: Tensor, task: int) -> Tensor:
    w = p.exp()
    if task:
        w.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return w


CHANGING: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "masks": lambda x, p, t: F.linear(x, (MASKS[t, :, None] * p).flatten(0, 1)[:3]),
    "masks that come to overlap": lambda x, p, t: F.linear(
        F.linear(x, p * MASKS[t, 0]).tanh(), p * MASKS[t, 1]
    ),
    "an index": lambda x, p, t: F.linear(x, p[torch.tensor([[0, 1, 2], [0, 0, 1]][t % 2])]),
    "an index in the same memory": lambda x, p, t: F.linear(x, copied_rows(p, t)),
    "a branch": lambda x, p, t: F.linear(x, p @ p if t else p * 2),
    "ranges that come to overlap": lambda x, p, t: (
        F.linear(x, p.flatten()[:6].view(2, 3)).tanh() @ p.flatten()[3 - t : 9 - t].view(2, 3)
    ),
    "strides": lambda x, p, t: x * p.as_strided((3,), (3,)) + p.as_strided((3,), (1,), t),
    "a sum": lambda x, p, t: F.linear(x, p.cumsum(t) if t else p),
    "one part of several": lambda x, p, t: x * p.unbind()[0].view(3) + p.unbind()[1 - t].view(3),
    "slices that are written": lambda x, p, t: F.linear(x, written(p, t)),
    "a mask written past its version": lambda x, p, t: F.linear(x, masked_past_its_version(p, t)),
    "a hook of a later batch": lambda x, p, t: F.linear(x, hooked(p, t)),
    "the number of uses": lambda x, p, t: reduce(lambda h, _: (h @ p.t()).tanh(), range(t + 1), x),
}


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("name", CHANGING)
def test_another_structure_in_each_batch(name: str, fisher_type: str) -> None:
    def run(x: Tensor, task: Tensor, p: Tensor) -> Tensor:
        return CHANGING[name](x, p, int(task))

    torch.manual_seed(0)
    tasks = (0, 1, 1, 0, 2 if name.startswith("masks") else 1)
    batches = [
        ((x, torch.tensor(task)), y)
        for task, (x, y) in zip(tasks, data(3, sizes=(5, 3, 1, 2, 7)), strict=True)
    ]
    holds(Applied(run, (3, 3)).double(), batches, fisher_type, once=True)


class Hypernetwork(nn.Module):
    """Makes the weights of a network from the embedding of a task, and gates its hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks, self.gates = nn.Embedding(3, 4), nn.Embedding(3, 4)
        self.make = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 24))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        made = self.make(self.tasks(task))
        hidden = F.linear(x, made[:12].view(4, 3)).tanh() * self.gates(task).sigmoid()
        return F.linear(hidden, made[12:].view(3, 4))


@pytest.mark.parametrize("fisher_type", TYPES)
def test_a_hypernetwork_with_another_task_in_each_batch(fisher_type: str) -> None:
    batches = [((x, torch.tensor(n % 3)), y) for n, (x, y) in enumerate(data(3))]
    holds(double(Hypernetwork), batches, fisher_type, once=True)


class Gated(nn.Module):
    """Writes the mask of a task into a buffer in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("mask", torch.ones(3))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        self.mask.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])[int(task)])
        return F.linear(x, self.p * self.mask)


@pytest.mark.parametrize("fisher_type", TYPES)
def test_a_mask_that_each_forward_pass_writes(fisher_type: str) -> None:
    torch.manual_seed(0)
    batches = [
        ((x, torch.tensor(task)), y)
        for task, (x, y) in zip((0, 1, 0), data(3, sizes=(5, 1, 3)), strict=True)
    ]
    holds(Gated().double(), batches, fisher_type, once=True)


def test_copies_leave_no_cycle() -> None:
    def run(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return torch.linalg.multi_dot([x, p.exp(), q])  # has no rule

    net = Applied(run, (3, 3), (3, 3)).double()
    alive: list[int] = []

    def batches() -> Iterator[Any]:
        for batch in data(3, sizes=(4,) * 6):
            alive.append(sum(issubclass(type(each), Tensor) for each in gc.get_objects()))
            yield batch

    gc.collect()
    gc.disable()
    try:
        EWC(net, Classification()).consolidate(batches())
    finally:
        gc.enable()
    assert max(alive[2:]) == min(alive[2:]), alive


def test_small_slopes_in_single_precision() -> None:
    """Their products underflow, and two zeros are equal."""
    torch.manual_seed(0)
    head = torch.randn(3, 65)

    def run(x: Tensor, p: Tensor) -> Tensor:
        made = torch.cat([p, p.new_zeros(63), p])  # twice, in different digits of the index
        return F.linear(x + x * (made * 1e-15), head)

    net = Applied(run, (1,))
    batches = [(torch.randn(size, 65), torch.randint(3, (size,))) for size in (4, 3)]
    ewc = EWC(net, Classification())
    summary = ewc.consolidate(iter(batches))
    assert set(summary.paths.values()) == {"rule"}
    found, expected = ewc.fisher["values.0"], oracle.fisher(net, batches)["values.0"]
    assert (found / expected - 1).abs() < 1e-4
