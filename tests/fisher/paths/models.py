"""Models whose forward pass is one function of a few layers and the inputs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support.fisher import data, double, holds


class Net(nn.Module):
    """`first`, what a test does with it, `last`; a vector, and a buffer."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.vector = nn.Parameter(torch.zeros(5))
        self.buffer: Tensor
        self.register_buffer("buffer", torch.arange(10.0).view(2, 5))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


Run = Callable[[Net, Tensor], Tensor]

_FOR_ONE: set[Run] = set()


def for_one_sample(run: Run) -> Run:
    """A run that is right for one sample only: `methods` gives it batches of one."""
    _FOR_ONE.add(run)
    return run


def methods(run: Run, fisher_type: str = "empirical") -> set[str]:
    """The Fisher of such a model equals the oracle's, over several batches; the methods it took."""
    batches = data(4, sizes=(1,) * 13) if run in _FOR_ONE else data(4)
    return set(holds(double(lambda: Net(run)), batches, fisher_type).values())
