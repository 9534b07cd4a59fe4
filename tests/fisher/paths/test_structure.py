"""Weights that depend on their parameters in another way in each batch."""

from collections.abc import Callable
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
