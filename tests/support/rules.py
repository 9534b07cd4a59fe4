"""Models of one operation, on random shapes, compared with the oracle."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ewc import Custom
from tests import oracle
from tests.support.asserts import assert_close
from tests.support.collecting import collected

Function = Callable[..., Any]

small = st.integers(1, 4)
seeds = st.integers(0, 2**16)
few = settings(max_examples=15, deadline=None, derandomize=True)
fewer = settings(few, max_examples=5)


def loss(outputs: Any) -> Tensor:
    """One smooth number for each sample of whatever the model returns."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    rows = (out.reshape(len(out), -1) for out in outputs)
    return sum((row * (1 + row.tanh())).mean(1) for row in rows)


def check(net: nn.Module, x: Any, *, path: str | None = "rule") -> None:
    """Collection equals the oracle, and every parameter took `path`."""
    net = net.double()
    for parameter in net.parameters():
        if not isinstance(parameter, nn.UninitializedParameter):
            nn.init.normal_(parameter)
    likelihood = Custom(lambda outputs: loss(outputs))
    found = collected(net, [(x,)], likelihood=likelihood)
    expected = oracle.empirical(net, (x,), loss)
    assert_close(found.sums, expected, 1e-9)
    if path is not None:
        assert set(found.paths.values()) <= {path}, found.paths


def noise(seed: int, *shape: int, strided: bool = False) -> Tensor:
    torch.manual_seed(seed)
    if strided:  # every second element along the last dimension, behind the first row
        return torch.randn(shape[0] + 1, *shape[1:-1], 2 * shape[-1]).double()[1:, ..., ::2]
    return torch.randn(shape).double()


class Applied(nn.Module):
    """A function of the inputs and of parameters of given shapes."""

    def __init__(self, function: Function, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.values = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.values)
