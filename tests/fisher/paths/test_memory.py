"""Memory made in the forward pass, into which samples are written."""

import pytest
import torch
from torch import Tensor

from tests.fisher.paths.models import Net, Run, for_one_sample, methods
from tests.support.fisher import TYPES

pytestmark = [
    pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning"),
    pytest.mark.filterwarnings("ignore::ewc.ZeroFisherWarning"),  # of parameters that are not used
]


def hidden(net: Net, x: Tensor) -> Tensor:
    return net.first(x) + net.vector


def empty(x: Tensor, *shape: int) -> Tensor:
    return torch.zeros(len(x), *shape, dtype=x.dtype)


def item_by_item(net: Net, x: Tensor) -> Tensor:
    h, out = hidden(net, x), empty(x, 5)
    for i in range(5):
        out[:, i] = h[:, i] * (1 + (out[:, i - 1].clone() if i else 0))
    return net.last(out)


def steps(net: Net, x: Tensor) -> Tensor:
    """As a recurrent network written by hand."""
    h, out = net.first(x), x.new_empty(3, len(x), 5)
    for t in range(3):
        h = torch.tanh(h + net.vector * t)
        out[t] = h
    return net.last(out.mean(0))


@for_one_sample
def views(net: Net, x: Tensor) -> Tensor:
    """Two views made before the first write, used after it; the sum is that before all writes."""
    out = x.new_ones(3, len(x), 5)
    before, one, another = out.sum(), out[0], out[1:].flatten(1)
    one.copy_(hidden(net, x))
    later = out[1]
    later.add_(one.clone().sin())
    out[2].mul_(net.vector)
    return net.last(out.sum(0) * one + another[0, :5] + before)


def halves(net: Net, x: Tensor) -> Tensor:
    both = empty(x, 10)
    left, right = both[:, :5], both[:, 5:]
    left.copy_(hidden(net, x))
    return net.last(left.tanh() + right)


def learned_state(net: Net, x: Tensor) -> Tensor:
    h = net.vector.expand(len(x), 5).clone()
    h[:, :2] = net.first(x)[:, :2]
    return net.last(h.tanh() * h)


def learned_without_graph(net: Net, x: Tensor) -> Tensor:
    """The gradient passes through what is written over without a graph, as in plain autograd."""
    h = net.vector.expand(len(x), 5).clone()
    with torch.no_grad():
        h[:, :2] = net.first(x)[:, :2]
    return net.last(h * h * net.first(x))


def learned_part(net: Net, x: Tensor) -> Tensor:
    """Parameters are written first, then samples."""
    out = torch.zeros(2, 5, dtype=x.dtype)
    out[0] = net.vector
    first = out[0]
    out[1] = net.first(x)[0]
    return net.last((out.prod(0) + first)[None])


@for_one_sample
def buffer(net: Net, x: Tensor) -> Tensor:
    net.buffer[:1] = hidden(net, x)[:1].detach()
    net.buffer.mul_(2)
    return net.last(hidden(net, x) * net.buffer[0] + net.buffer[1])


def detached(net: Net, x: Tensor) -> Tensor:
    """It sees the writes, and no gradient passes through it."""
    out = empty(x, 5)
    alias = out.detach()
    out[:] = hidden(net, x)
    return net.last(out * alias)


def index_add(net: Net, x: Tensor) -> Tensor:
    out = empty(x, 7).index_add_(1, torch.tensor([0, 1, 1, 2, 0]), hidden(net, x))
    return net.last(out[:, :5])


def scatter_add(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    return net.last(torch.zeros_like(h).scatter_add_(1, h.argsort(1), h))


def index_put(net: Net, x: Tensor) -> Tensor:
    h, out = hidden(net, x)[0], torch.zeros(5, dtype=x.dtype)
    out.index_put_((h.argsort() // 2,), h, accumulate=True)
    return net.last(out[None])


@for_one_sample
def index_with_samples(net: Net, x: Tensor) -> Tensor:
    """Only the index has samples, not what is written."""
    h, out = hidden(net, x), torch.ones(5, dtype=x.dtype)
    out[h[0].argmax()] = 0.5
    return net.last(h * out)


@for_one_sample
def masked_fill(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    return net.last(h * torch.full((1, 5), 3.0, dtype=x.dtype).masked_fill_(h > 0, 2.0))


def added(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(5, dtype=x.dtype)
    for part in (hidden(net, x)[0], net.first(x)[0].tanh()):
        out += part
    return net.last(out[None])


def written_without_graph(net: Net, x: Tensor) -> Tensor:
    out, sums = empty(x, 5), empty(x, 5)
    with torch.no_grad():
        out.copy_(net.first(x))
        torch.add(out, 1, out=sums)
    return net.last((out + sums) * net.vector)


def outputs(net: Net, x: Tensor) -> Tensor:
    """The outputs of the model are such memory."""
    out = empty(x, 3)
    out[:] = net.last(hidden(net, x))
    return out


def counted(net: Net, x: Tensor) -> Tensor:
    """Whole numbers, read to branch on them."""
    seen = torch.zeros(2, dtype=torch.long)
    seen[0] = x.new_tensor(3).long()
    seen[1] = (x[0, 0] > -100).long() + 1
    return net.last(hidden(net, x) * (2.0 if seen.sum() == 5 else 1.0))


def seen_without_graph(net: Net, x: Tensor) -> Tensor:
    """A view that is made and written without a graph."""
    out = torch.zeros(2, len(x), 5, dtype=x.dtype)
    with torch.no_grad():
        view = out[0]
        view.copy_(net.first(x))
    return net.last((out.sum(0) + view) * net.vector)


def transposed(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 5, 2, dtype=x.dtype).transpose(1, 2)
    h = net.first(x)
    out[:, 0] = h
    out.transpose(1, 2)[:, :, 1] = net.vector * h
    return net.last(out.prod(1))


def several(net: Net, x: Tensor) -> Tensor:
    h, out = hidden(net, x), [empty(x, 5), empty(x, 5)]
    torch._foreach_add_(out, [h, h * 2])
    return net.last(out[0] * out[1])


def an_index(net: Net, x: Tensor) -> Tensor:
    order = torch.zeros(len(x), 5, dtype=torch.long)
    order[:] = net.first(x).argsort(1)
    return net.last(hidden(net, x).gather(1, order) * net.vector[order])


def only_read(net: Net, x: Tensor) -> Tensor:
    mask = torch.zeros(5, dtype=x.dtype)
    mask[2:] = 1
    return net.last(hidden(net, x) * mask + torch.arange(5))


RULE = [item_by_item, steps, views, halves, buffer, detached, index_add, scatter_add, index_put]
RULE += [seen_without_graph, transposed, several, an_index]
RULE += [index_with_samples, masked_fill, added, written_without_graph, outputs, counted, only_read]


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("run", RULE, ids=lambda run: run.__name__)
def test_writes_go_by_rule(run: Run, fisher_type: str) -> None:
    assert methods(run, fisher_type) <= {"rule", "unused"}


@pytest.mark.parametrize(
    "run", [learned_state, learned_without_graph, learned_part], ids=lambda run: run.__name__
)
def test_writes_into_what_is_made_of_parameters_go_by_a_copy(run: Run) -> None:
    assert methods(run) == {"rule", "vmap"}


CACHE: dict[int, Tensor] = {}


def cached(net: Net, x: Tensor) -> Tensor:
    """Memory that outlives the forward pass is never one per sample."""
    if 5 not in CACHE:
        CACHE[5] = torch.ones(5, dtype=x.dtype)
    out = empty(x, 5)
    out[:] = hidden(net, x)
    return net.last(out * CACHE[5])


def test_a_cache_holds_plain_tensors() -> None:
    CACHE.clear()
    assert methods(cached) == {"rule"}
    assert torch.equal(CACHE[5], torch.ones(5))


def some_samples(net: Net, x: Tensor) -> Tensor:
    """The first two samples write nothing."""
    h, out = hidden(net, x), empty(x, 5)
    if x[0, 0] > 1:
        out[:, 0] = h[:, 0]
    return net.last(h + out)


def test_writes_of_later_samples_only() -> None:
    assert methods(some_samples) <= {"rule", "loop"}


def reshaped(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(5, dtype=x.dtype)
    out.copy_(hidden(net, x)[0])
    out.unsqueeze_(0)
    return net.last(out)


@for_one_sample
def seen_as_another_dtype(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(10, dtype=x.dtype)
    pairs = torch.view_as_complex(out.view(5, 2))
    out[:5] = hidden(net, x)[0].detach()
    return net.last(pairs.abs()[None] + net.first(x))


def behind_the_graph(net: Net, x: Tensor) -> Tensor:
    out = net.vector * torch.ones(len(x), 5, dtype=x.dtype)
    out.data[:, :2] = net.first(x)[:, :2].detach()
    return net.last(out * net.first(x))


@for_one_sample
def in_a_transform(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(3, 5, dtype=x.dtype)
    out[:] = hidden(net, x)
    return net.last(torch.func.vmap(torch.sin)(out).sum(0, keepdim=True))


@pytest.mark.parametrize(
    "run",
    [reshaped, seen_as_another_dtype, behind_the_graph, in_a_transform],
    ids=lambda run: run.__name__,
)
def test_what_memory_per_sample_cannot_be_is_the_loop(run: Run) -> None:
    assert methods(run) <= {"loop", "unused"}
