"""Batch norm on the CPU, whose reverse pass PyTorch gets wrong for some strides."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc import Custom
from ewc.fisher.paths.graph import correct_batch_norms, nodes
from tests import oracle
from tests.support.asserts import assert_close
from tests.support.collecting import collected

CHANNELS = 3


def sums(outputs: Tensor) -> Tensor:
    return outputs.flatten(1).tanh().sum(1)


class Tokens(nn.Module):
    """Convolution, a norm, tokens: a patch embedding; the norm may be written out."""

    def __init__(self, norm: nn.Module, dims: int = 2, kernel: int = 2) -> None:
        super().__init__()
        convolution = nn.Conv2d if dims == 2 else nn.Conv3d
        self.conv = convolution(1, CHANNELS, kernel, kernel)
        self.norm = norm
        self.head = nn.Linear(CHANNELS, 2)
        torch.manual_seed(0)
        for each in (*self.parameters(), *(b for b in self.buffers() if b.is_floating_point())):
            nn.init.uniform_(each, 0.5, 1.5)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.norm(self.conv(x)).flatten(2).transpose(1, 2))
        return outputs


class WrittenOut(nn.Module):
    """A norm in eval mode, by simple operations on its parameters and buffers."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        def channels(each: Tensor) -> Tensor:
            return each.view(-1, *[1] * (x.dim() - 2))

        if self.running_mean is None:
            spatial = tuple(range(2, x.dim()))
            mean = x.mean(spatial, keepdim=True)
            var = x.var(spatial, keepdim=True, unbiased=False)
        else:
            mean, var = channels(self.running_mean), channels(self.running_var)
        normal = (x - mean) / (var + self.eps).sqrt()
        return (
            normal if self.weight is None else normal * channels(self.weight) + channels(self.bias)
        )


def singly(x: Tensor) -> Iterator[tuple[Tensor]]:
    """Two samples first, then one at a time, which no loader may bundle."""
    yield (x[:2],)
    for n in range(2, len(x)):
        yield (x[n : n + 1],)


def test_the_batch_norm_of_a_patch_embedding() -> None:
    net, x = Tokens(nn.BatchNorm2d(CHANNELS)), torch.randn(6, 1, 4, 4).double()
    found = collected(net, singly(x), likelihood=Custom(sums))
    assert_close(found.sums, oracle.rows(net, (x,), sums), 1e-9)
    assert set(found.paths.values()) == {"rule"}


NORMS = {
    "batch": (lambda: nn.BatchNorm2d(CHANNELS), (4, 4)),
    "batch, no affine": (lambda: nn.BatchNorm2d(CHANNELS, affine=False), (4, 4)),
    "batch, frozen": (lambda: nn.BatchNorm2d(CHANNELS).requires_grad_(False), (4, 4)),
    "batch, 3d": (lambda: nn.BatchNorm3d(CHANNELS), (4, 4, 4)),
    "batch, thin": (lambda: nn.BatchNorm2d(CHANNELS), (2, 8)),
    "instance": (lambda: nn.InstanceNorm2d(CHANNELS, affine=True), (4, 4)),
    "instance, no affine": (lambda: nn.InstanceNorm2d(CHANNELS), (4, 4)),
    "instance, tracking": (
        lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True),
        (4, 4),
    ),
    "instance, 3d": (lambda: nn.InstanceNorm3d(CHANNELS, affine=True), (4, 2, 4)),
    "batch, scripted": (lambda: torch.jit.script(nn.BatchNorm2d(CHANNELS)), (4, 4)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.")
@pytest.mark.parametrize("name", NORMS)
def test_norms_before_tokens(name: str) -> None:
    make, size = NORMS[name]
    net = Tokens(make(), dims=len(size))
    right = Tokens(WrittenOut(net.norm), dims=len(size))
    right.load_state_dict(net.state_dict(), strict=False)
    x = torch.randn(4, 1, *size).double()
    expected = oracle.empirical(right, (x,), sums)
    found = collected(net, singly(x), likelihood=Custom(sums))
    assert_close(found.sums, expected, 1e-9)
    single = collected(net, iter([(x[:1],)]), likelihood=Custom(sums))
    assert_close(single.sums, oracle.empirical(right, (x[:1],), sums), 1e-9)
    if "scripted" not in name:
        assert set(found.paths.values()) == {"rule"}


def test_an_input_with_unusual_strides() -> None:
    class Columns(nn.Module):
        """Sequences as images of width one, whose strides fit channels_last."""

        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm, self.head = norm, nn.Linear(8, 2)
            self.double().eval()

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.norm(x.transpose(1, 2).unsqueeze(-1))
            return self.head(outputs[..., 0])

    torch.manual_seed(0)
    net = Columns(nn.BatchNorm2d(CHANNELS))
    nn.init.uniform_(net.norm.weight)
    right = Columns(WrittenOut(net.norm))
    right.load_state_dict(net.state_dict(), strict=False)
    x = torch.randn(5, 8, CHANNELS).double()
    for batches in (singly(x), iter([(x,)])):
        found = collected(net, batches, likelihood=Custom(sums))
        assert_close(found.sums, oracle.empirical(right, (x,), sums), 1e-9)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 3, 1, 2), (2, 3, 2, 1), (1, 3, 1, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reverse_pass_does_not_depend_on_strides(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(2, *shape).to(dtype).unbind(0)
    mean, var, scale, shift = (0.5 + torch.rand(4, CHANNELS)).to(dtype)

    def gradients(x: Tensor, g: Tensor) -> list[Tensor]:
        leaves = [each.detach().requires_grad_() for each in (x, scale, shift)]
        outputs = F.batch_norm(leaves[0], mean, var, leaves[1], leaves[2])
        correct_batch_norms(nodes(outputs.grad_fn))
        return list(torch.autograd.grad(outputs, leaves, g))

    right = gradients(x, g)
    for one in strided(x):
        for other in strided(g):
            torch.testing.assert_close(gradients(one, other), right)


def strided(tensor: Tensor) -> Iterator[Tensor]:
    """The values, channels first or last in memory, with any strides where the size is one."""
    dims = range(tensor.dim())
    for order in (tuple(dims), (0, *dims[2:], 1)):
        usual = torch.empty_permuted(tensor.shape, order).stride()
        for odd in (None, 1, 3):
            strides = [
                odd if odd and size == 1 else stride
                for size, stride in zip(tensor.shape, usual, strict=True)
            ]
            yield torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
