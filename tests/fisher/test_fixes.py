"""The `SlowPathWarning` says why, and what to do; what it says helps."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ewc import EWC, SlowPathWarning
from tests.fisher.paths.models import Net, Run, methods
from tests.support.fisher import data, double, likelihood


def hidden(net: Net, x: Tensor) -> Tensor:
    return net.first(x) + net.vector


def by_autograd(net: Net, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (force,) = torch.autograd.grad(hidden(net, x).tanh().sum(), x, create_graph=True)
    return net.last(torch.cat([force, force[:, :1]], 1))


def by_func(net: Net, x: Tensor) -> Tensor:
    force = torch.func.grad(lambda x: hidden(net, x).tanh().sum())(x)
    return net.last(torch.cat([force, force[:, :1]], 1))


GRID = torch.linspace(-3, 3, 200, dtype=torch.float64)


def selected(net: Net, x: Tensor) -> Tensor:
    each = [GRID[x[n, 0] > GRID].sum() for n in range(len(x))]
    return net.last(hidden(net, x)) * torch.stack(each)[:, None]


def masked(net: Net, x: Tensor) -> Tensor:
    each = torch.where(x[:, :1] > GRID, GRID, 0.0).sum(1)
    return net.last(hidden(net, x)) * each[:, None]


def in_numpy(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    return net.last(h * torch.from_numpy(np.cos(h.detach().numpy())))


def in_torch(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    return net.last(h * h.detach().cos())


def reshaped(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 5, dtype=x.dtype)
    out.copy_(hidden(net, x))
    out.unsqueeze_(0)
    return net.last(out[0])


def not_reshaped(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 5, dtype=x.dtype)
    out.copy_(hidden(net, x))
    return net.last(out.unsqueeze(0)[0])


@pytest.mark.parametrize(
    ("slow", "parts", "fixed"),
    [
        (by_autograd, ["differentiates by autograd", "torch.func.grad"], by_func),
        (selected, ["shapes differ between samples", "torch.where"], masked),
        (in_numpy, ["numpy", "PyTorch instead of NumPy"], in_torch),
        (reshaped, ["changes the shape", "unsqueeze for unsqueeze_"], not_reshaped),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_the_warning_says_what_to_do(slow: Run, parts: list[str], fixed: Run) -> None:
    ewc = EWC(double(lambda: Net(slow)), likelihood("empirical"))
    with pytest.warns(SlowPathWarning) as caught:
        ewc.consolidate(data(4, sizes=(40,)))
    (text,) = [str(each.message) for each in caught if each.category is SlowPathWarning]
    for part in [*parts, "because", "Fix: "]:
        assert part in text
    assert methods(fixed) <= {"rule", "vmap"}
