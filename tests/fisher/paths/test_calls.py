"""Calls that vmap cannot do as they are: leaves, `.data`, `.view` of what is not contiguous."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from tests.fisher.paths.models import Net, Run, for_one_sample, methods
from tests.support.fisher import TYPES
from tests.support.versions import needs_causal_bias

pytestmark = pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning")


def leaves(net: Net, x: Tensor) -> Tensor:
    """As the hooks that Hugging Face's models are left with after training with checkpoints."""
    x.requires_grad_()
    x.requires_grad = True
    h = net.first(x)
    h.requires_grad_(True)
    h.retain_grad()
    return net.last((h + net.vector).tanh().requires_grad_())


def asks_for_a_graph(net: Net, x: Tensor) -> Tensor:
    h = net.first(x) + net.vector
    assert h.requires_grad
    assert not h.detach().requires_grad
    assert not x.requires_grad
    return net.last(h)


def straight_through(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    return net.last((h.round() - h).data + h + net.vector)


def view(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)[None].expand(3, -1, -1).transpose(0, 1) * net.vector
    moved = h.flatten(1) if len(x) > 1 else h.view(1, 15)
    return net.last(moved[:, :5] + moved[:, 5:10])


@for_one_sample
def sizes_in_tensors(net: Net, x: Tensor) -> Tensor:
    """Sizes computed from values, equal for all samples."""
    h = net.first(x) * net.vector
    five = (x[0] > -100).sum() + 1
    return net.last(h.view(five, -1).t().reshape(len(x), five) + x.new_zeros(five))


def view_of_an_einsum(net: Net, x: Tensor) -> Tensor:
    h = torch.einsum("ni,ji->jn", x, net.first.weight).t() + net.first.bias
    return net.last(h.view(len(x), -1) + net.vector)


def attention(net: Net, x: Tensor) -> Tensor:
    q = (net.first(x) * net.vector).view(len(x), 1, 5, 1).expand(-1, -1, -1, 2)
    k = q.repeat(1, 1, 2, 1)
    one = F.scaled_dot_product_attention(q, k, k, causal_lower_right(5, 10))
    other = F.scaled_dot_product_attention(q, k, k, causal_upper_left(5, 10))
    return net.last((one + other).sum(-1).flatten(1))


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(attention, marks=needs_causal_bias),
        sizes_in_tensors,
        leaves,
        asks_for_a_graph,
        straight_through,
        view,
        view_of_an_einsum,
    ],
    ids=lambda run: run.__name__,
)
def test_goes_by_rule(run: Run, fisher_type: str) -> None:
    assert methods(run, fisher_type) == {"rule"}
