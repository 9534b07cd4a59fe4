"""Calls that vmap refuses, once for each sample: functions of the old style, sizes by value."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from tests.fisher.paths.models import Net, Run, for_one_sample, methods
from tests.support.fisher import TYPES, data, double, holds, sequences

pytestmark = [
    pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning"),
    pytest.mark.filterwarnings("ignore::ewc.ZeroFisherWarning"),  # of parameters that are not used
]


class StraightThrough(torch.autograd.Function):
    """Rounds, and lets the gradient pass, scaled."""

    @staticmethod
    def forward(ctx, x, scale=1.0):
        assert ctx.needs_input_grad == (True, False)[: len(ctx.needs_input_grad)]
        ctx.scale = scale
        ctx.save_for_backward(x)
        return (x * 4).round() / 4 * scale

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos() * ctx.scale, None


bound_early = StraightThrough.apply


class Reversal(torch.autograd.Function):
    """Its output is a view of its input."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -3 * g


class Layer(torch.autograd.Function):
    """Has parameters, another function inside, several outputs, and one that is no tensor."""

    @staticmethod
    def forward(ctx, x, options, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.mark_non_differentiable(which := x.argmax())
        return Reversal.apply(x) @ weight.t() + bias, x.sum() * options["scale"], which, 3

    @staticmethod
    def backward(ctx, g, g_sum, *_):
        x, weight = ctx.saved_tensors
        return g @ weight + 2 * g_sum, None, g.t() @ x, g.sum(0)


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class InNumpy(torch.autograd.Function):
    """Of the new style, without a rule for vmap."""

    @staticmethod
    def forward(x):
        return torch.from_numpy(np.square(x.numpy()))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Sparse(torch.autograd.Function):
    """Branches by values, as a spiking neuron or a sparse softmax may."""

    @staticmethod
    def forward(ctx, x):
        ctx.few = bool(x.sum() > 0)
        return x * 2 if ctx.few else x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * (2 if ctx.few else 5)


class Sometimes(torch.autograd.Function):
    """Writes in place for some samples, and makes a new tensor for others."""

    @staticmethod
    def forward(ctx, x):
        ctx.in_place = bool(x.sum() > 0)
        if not ctx.in_place:
            return x.sin()
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return g * (2 if ctx.in_place else 5)


class Running(torch.autograd.Function):
    """Updates a count that the samples share."""

    @staticmethod
    def forward(ctx, x, statistics):
        statistics.add_(1)
        ctx.save_for_backward(statistics.clone())
        return x * statistics

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


def hidden(net: Net, x: Tensor) -> Tensor:
    return net.first(x) + net.vector


def twice(net: Net, x: Tensor) -> Tensor:
    h = StraightThrough.apply(hidden(net, x))
    return net.last(h.tanh() * StraightThrough.apply(net.first(x), 2.0))


def bound(net: Net, x: Tensor) -> Tensor:
    return net.last(bound_early(hidden(net, x)).tanh())


def reversal(net: Net, x: Tensor) -> Tensor:
    return net.last(Reversal.apply(hidden(net, x)).tanh())


def in_place(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    doubled = InPlace.apply(h)
    return net.last(h.tanh() + doubled)


def in_numpy(net: Net, x: Tensor) -> Tensor:
    return net.last(InNumpy.apply(hidden(net, x)))


def branches(net: Net, x: Tensor) -> Tensor:
    return net.last(Sparse.apply(hidden(net, x)))


def without_graph(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    with torch.no_grad():
        factor = Reversal.apply(h)
    return net.last(h * factor)


def of_weights(net: Net, x: Tensor) -> Tensor:
    """No sample is in it: it runs once."""
    return F.linear(hidden(net, x), Reversal.apply(net.last.weight), net.last.bias)


def of_inputs(net: Net, x: Tensor) -> Tensor:
    return net.last(hidden(net, InNumpy.apply(x)))


def mask_is_set(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x).clone()
    h[h > 0] = 0.3
    return net.last(h)


def counts(net: Net, x: Tensor) -> Tensor:
    share = torch.bincount(x[0].argsort(), minlength=5)
    return net.last(hidden(net, x) * share)


RULE = [twice, reversal, in_place, in_numpy, branches, without_graph, of_weights, of_inputs]
RULE += [mask_is_set, counts]


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("run", RULE, ids=lambda run: run.__name__)
def test_what_vmap_refuses_goes_by_rule(run: Run, fisher_type: str) -> None:
    assert methods(run, fisher_type) == {"rule"}


@pytest.mark.parametrize("fisher_type", TYPES)
def test_a_method_that_was_bound_early(fisher_type: str) -> None:
    old = TorchVersion(torch.__version__) < "2.14"
    assert methods(bound, fisher_type) == {"rule" if old else "loop"}


@pytest.mark.parametrize("fisher_type", TYPES)
def test_parameters_of_a_function_have_copies(fisher_type: str) -> None:
    @for_one_sample
    def run(net: Net, x: Tensor) -> Tensor:
        out, total, which, three = Layer.apply(
            net.first(x), {"scale": 2}, net.last.weight, net.last.bias
        )
        return out * three + total + which + net.vector[:3]

    assert methods(run, fisher_type) == {"rule", "vmap"}


@pytest.mark.parametrize("fisher_type", TYPES)
def test_samples_of_equal_sizes_are_one_group(fisher_type: str) -> None:
    @for_one_sample
    def run(net: Net, x: Tensor) -> Tensor:
        h = hidden(net, x)
        return net.last(h) * h[h > 0].sum()

    assert methods(run, fisher_type) <= {"rule", "loop"}


def sometimes(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    out = Sometimes.apply(h)
    return net.last(h.tanh() + out)


def running(net: Net, x: Tensor) -> Tensor:
    return net.last(Running.apply(hidden(net, x), net.buffer[0]))


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("run", [sometimes, running], ids=lambda run: run.__name__)
def test_what_differs_between_samples_is_found(run: Run, fisher_type: str) -> None:
    assert methods(run, fisher_type) <= {"rule", "loop"}


class Experts(nn.Module):
    """Each token goes to one of two layers, as in a mixture of experts run eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.read = nn.Linear(4, 2), nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores, chosen = self.gate(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == number)
            out.index_add_(0, rows, expert(tokens[rows]) * scores[rows, None])
        return self.read(out.view_as(x).mean(1))


@pytest.mark.parametrize("fisher_type", TYPES)
def test_experts_are_grouped_by_how_many_tokens_they_take(fisher_type: str) -> None:
    assert set(holds(double(Experts), sequences(4), fisher_type).values()) <= {"rule", "loop"}
    few = [(x[:, :1], y) for x, y in sequences(4)]
    assert set(holds(double(Experts), few, fisher_type).values()) == {"rule"}


@for_one_sample
def aliased(net: Net, x: Tensor) -> Tensor:
    """Writes into a view of which vmap has made a copy."""
    h = (net.first(x)[None].expand(3, -1, -1) * net.vector).transpose(0, 1)
    if len(x) == 1:
        h.view(1, 15).mul_(2)
    return net.last(h[:, 0])


def test_a_write_into_a_copied_view_is_the_loop() -> None:
    assert methods(aliased) <= {"loop", "rule"}


class Stacked(nn.Module):
    """The layers of all experts lie in one parameter; which a sample takes is its own choice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.read = nn.Linear(4, 2), nn.Linear(4, 3)
        self.experts = nn.Parameter(torch.zeros(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number in (F.one_hot(chosen, 2).sum(0) > 0).nonzero()[:, 0]:
            rows, _ = torch.where(chosen[:, None] == number)
            out.index_add_(0, rows, F.linear(x[rows], self.experts[number]) * scores[rows, None])
        return self.read(out)


class Named(nn.Module):
    """Experts by name, which is written with a number that is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.read = nn.Linear(4, 2), nn.Linear(4, 3)
        self.experts = nn.ModuleDict({f"expert_{number}": nn.Linear(4, 4) for number in range(2)})

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number in (F.one_hot(chosen, 2).sum(0) > 0).nonzero():
            rows, _ = torch.where(chosen[:, None] == number)
            expert = self.experts[f"expert_{number[0]}"]
            out.index_add_(0, rows, expert(x[rows]) * scores[rows, None])
        return self.read(out)


@pytest.mark.parametrize("fisher_type", TYPES)
def test_experts_by_name(fisher_type: str) -> None:
    paths = holds(double(Named), data(4), fisher_type)
    assert set(paths.values()) - {"unused"} == {"rule"}  # one is not chosen


@pytest.mark.parametrize("fisher_type", TYPES)
def test_experts_that_lie_in_one_parameter(fisher_type: str) -> None:
    assert set(holds(double(Stacked), data(4), fisher_type).values()) == {"rule"}
