"""Weights built out of parameters that no call shows, beside protected biases; late gates."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import oracle
from tests.support.asserts import assert_close
from tests.support.collecting import collected

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")

LOWER = torch.tril_indices(4, 4, -1)


def lower(theta: Tensor) -> Tensor:
    weight = torch.zeros(4, 4, dtype=theta.dtype)
    weight[LOWER[0], LOWER[1]] = theta
    return weight


def cholesky(theta: Tensor) -> Tensor:
    weight = lower(theta) + torch.eye(4, dtype=theta.dtype)
    return weight @ weight.t()


def rotation(theta: Tensor) -> Tensor:
    weight = lower(theta)
    return torch.linalg.matrix_exp(weight - weight.t())


def scripted(theta: Tensor) -> Tensor:
    weight = torch.zeros(4, 4, dtype=theta.dtype)
    for n in range(3):
        weight[n + 1, n] = theta[n]
    return weight


class Built(nn.Module):
    def __init__(self, build: object, *, is_gated: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.theta, self.bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(4))
        self.build, self.is_gated = build, is_gated
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.is_gated and bool(x[0, 0] < 0):
            return x + self.bias
        return F.linear(x, self.build(self.theta), self.bias)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:`torch.jit.")  # its category depends on the version
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("build", [lower, cholesky, rotation, scripted])
def test_a_weight_that_is_built(build: object, is_gated: bool) -> None:
    plain = Built(build, is_gated=is_gated)  # the same values
    net = Built(torch.jit.script(build) if build is scripted else build, is_gated=is_gated)
    x, y = torch.randn(8, 4).double(), torch.randint(4, (8,))
    x[:, 0] = torch.tensor([-1.0] * 4 + [1.0] * 4)  # the gate opens in the second batch
    found = collected(net, iter([(x[:4], y[:4]), (x[4:], y[4:])]))
    assert_close(found.sums, oracle.empirical(plain, (x, y)), 1e-9)
    assert found.paths["theta"] in ("rule", "vmap", "loop")


class Late(nn.Module):
    """What vmap refuses is met in a later batch only, after another layer has been used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if bool(x[0, 0] < 0):
            outputs: Tensor = self.first(x)
            return outputs
        x = x.detach().requires_grad_()
        h = self.second(x)
        (gradient,) = torch.autograd.grad(h.tanh().sum(), x, create_graph=True)
        return h + gradient


def test_the_paths_when_a_method_is_given_up() -> None:
    net, x, y = Late(), torch.randn(8, 4).double(), torch.randint(4, (8,))
    x[:, 0] = torch.tensor([-1.0] * 4 + [1.0] * 4)
    found = collected(net, iter([(x[:4], y[:4]), (x[4:], y[4:])]))
    assert all(path != "unused" for path in found.paths.values())
    assert found.paths["second.weight"] == "loop"
    assert "differentiates" in found.reasons["second.weight"]
