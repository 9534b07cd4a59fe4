"""Recurrent layers and cells: RNN, GRU and LSTM with all of PyTorch's options.

The inputs' share of the gates is one product for all time steps; only the states go step by step.
The gradient that comes back to that share is the gradient of the gates, and gives the per-sample
gradients of *all* weights at once: those of the inputs with the inputs, those of the states with
the states one step before.

Index legend: `t` time step, `m` samples and batch dimension together, `g` gate, `h` state.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc.fisher.gradients import Outer, Total
from ewc.fisher.rules._registry import NotCovered, Operation, rewriting, rule


class _Weights(NamedTuple):
    """One layer's parameters in one direction; what is absent is None."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    projection: Tensor | None


def _split(weights: Sequence[Tensor], biased: bool, projected: bool) -> list[_Weights]:
    """PyTorch's flat list, cut into layers and directions."""
    size = 2 + 2 * biased + projected
    rows = [list(weights[start : start + size]) for start in range(0, len(weights), size)]
    return [
        _Weights(
            row[0],
            row[1],
            row[2] if biased else None,
            row[3] if biased else None,
            row[-1] if projected else None,
        )
        for row in rows
    ]


class _Steps:
    """One layer in one direction over time: the gates' shares in, the states out.

    Args:
        op: The operation that is being replaced.
        weights: The layer's parameters.
        x: The layer's inputs, `[T, M, I]`.
        samples: N, where M = N * B.
    """

    def __init__(self, op: Operation, weights: _Weights, x: Tensor, samples: int) -> None:
        self.op, self.weights, self.samples = op, weights, samples
        self.hidden = op.value(weights.hidden)
        self.before: list[Tensor] = []  # the states that each step starts from
        self.scale: list[Tensor] = []  # a GRU's reset gates
        bias = None
        if weights.input_bias is not None and weights.hidden_bias is not None:
            bias = op.value(weights.input_bias)
            self.hidden_bias = op.value(weights.hidden_bias)
        share = F.linear(x, op.value(weights.input), bias)
        self.share = op.watch(
            share,
            {
                weights.input: lambda g: Outer(self.by_sample(g), self.by_sample(x)),
                weights.input_bias: lambda g: Total(self.by_sample(g)),
                weights.hidden: lambda g: Outer(
                    self.by_sample(self.gates(g)), self.by_sample(torch.stack(self.before))
                ),
                weights.hidden_bias: lambda g: Total(self.by_sample(self.gates(g))),
            },
        )

    def by_sample(self, tensor: Tensor) -> Tensor:
        """`[T, M, D] -> [N, T * B, D]`."""
        return torch.unflatten(tensor, 1, (self.samples, -1)).transpose(0, 1).flatten(1, 2)

    def gates(self, g: Tensor) -> Tensor:
        """The gradient of the states' share of the gates, from that of the inputs' share."""
        if not self.scale:
            return g
        reset, update, new = g.chunk(3, 2)
        return torch.cat([reset, update, new * torch.stack(self.scale)], 2)

    def recur(self, h: Tensor) -> Tensor:
        """The states' share of the gates, `[M, G]`."""
        self.before.append(h.detach())
        bias = None if self.weights.hidden_bias is None else self.hidden_bias
        return F.linear(h, self.hidden, bias)

    def project(self, h: Tensor) -> Tensor:
        """An LSTM's projection of its state, if it has one."""
        weight = self.weights.projection
        if weight is None:
            return h
        out = F.linear(h, self.op.value(weight))
        rows = h.detach()

        def gradient(g: Tensor) -> Outer:
            sizes = (self.samples, -1)
            return Outer(torch.unflatten(g, 0, sizes), torch.unflatten(rows, 0, sizes))

        return self.op.watch(out, {weight: gradient})


def _rnn(activation: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def step(steps: _Steps, share: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return (activation(share + steps.recur(h)),)

    return step


def _gru(steps: _Steps, share: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    reset_x, update_x, new_x = share.chunk(3, 1)
    reset_h, update_h, new_h = steps.recur(h).chunk(3, 1)
    reset, update = (reset_x + reset_h).sigmoid(), (update_x + update_h).sigmoid()
    steps.scale.append(reset.detach())
    new = (new_x + reset * new_h).tanh()
    return (torch.lerp(new, h, update),)


def _lstm(steps: _Steps, share: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    gate_in, gate_forget, cell, gate_out = (share + steps.recur(h)).chunk(4, 1)
    c = gate_forget.sigmoid() * c + gate_in.sigmoid() * cell.tanh()
    return steps.project(gate_out.sigmoid() * c.tanh()), c


def _layers(
    op: Operation,
    step: Callable[..., tuple[Tensor, ...]],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[_Weights],
    directions: int,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """All layers and directions; `(output, *last states)`, samples in front."""
    x = op.samples(input)
    if x.dim() == 3:
        raise NotCovered
    x = x.permute(2, 0, 1, 3) if batch_first else x.permute(1, 0, 2, 3)  # [T, N, B, I]
    samples, batch = x.shape[1:3]
    x = x.flatten(1, 2)
    starts = [op.samples(state).transpose(0, 1).flatten(1, 2) for state in states]
    ends: list[tuple[Tensor, ...]] = []
    for layer in range(0, len(weights), directions):
        outputs = []
        for direction in range(directions):
            steps = _Steps(op, weights[layer + direction], x, samples)
            state = tuple(start[layer + direction] for start in starts)
            order = range(x.shape[0]) if direction == 0 else range(x.shape[0] - 1, -1, -1)
            shares = steps.share.unbind(0)
            over_time: dict[int, Tensor] = {}
            for t in order:
                state = step(steps, shares[t], *state)
                over_time[t] = state[0]
            if direction == 1:
                steps.before.reverse()
                steps.scale.reverse()
            outputs.append(torch.stack([over_time[t] for t in range(x.shape[0])]))
            ends.append(state)
        x = torch.cat(outputs, 2) if directions > 1 else outputs[0]
    output = torch.unflatten(x, 1, (samples, batch))  # [T, N, B, H]
    output = output.permute(1, 2, 0, 3) if batch_first else output.transpose(0, 1)
    last = (
        torch.unflatten(torch.stack(kind, 1), 0, (samples, batch))
        for kind in zip(*ends, strict=True)
    )
    return output, *(state.transpose(1, 2) for state in last)


def _define(function: Callable[..., Any], step: Callable[..., tuple[Tensor, ...]]) -> None:
    """Register the rule of a layer with one state."""

    @rule(function, always=True)
    def recur(
        op: Operation,
        input: Tensor,
        hx: Tensor,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool = False,
    ) -> tuple[Tensor, ...]:
        if not isinstance(has_biases, bool) or (train and dropout):
            raise NotCovered  # a PackedSequence has other arguments in these places
        weights = _split(params, has_biases, projected=False)
        return _layers(op, step, input, (hx,), weights, 1 + bidirectional, batch_first)


_define(torch.rnn_tanh, _rnn(torch.tanh))
_define(torch.rnn_relu, _rnn(torch.relu))
_define(torch.gru, _gru)


@rule(torch.lstm, always=True)
def lstm(
    op: Operation,
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """An LSTM, its states projected or not (`proj_size`)."""
    if not isinstance(has_biases, bool) or (train and dropout):
        raise NotCovered  # a PackedSequence has other arguments in these places
    directions = 1 + bidirectional
    projected = len(params) == num_layers * directions * (3 + 2 * has_biases)
    weights = _split(params, has_biases, projected)
    return _layers(op, _lstm, input, hx, weights, directions, batch_first)


@rewriting(torch.rnn_tanh_cell)
def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a recurrence written out by hand."""
    return torch.tanh(F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))


@rewriting(torch.rnn_relu_cell)
def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a recurrence written out by hand."""
    return torch.relu(F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))


@rewriting(torch.gru_cell)
def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU written out by hand."""
    reset_x, update_x, new_x = F.linear(input, w_ih, b_ih).chunk(3, -1)
    reset_h, update_h, new_h = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    reset, update = (reset_x + reset_h).sigmoid(), (update_x + update_h).sigmoid()
    new = (new_x + reset * new_h).tanh()
    return new + update * (hx - new)


@rewriting(torch.lstm_cell)
def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM written out by hand."""
    h, c = hx
    gates = F.linear(input, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
    gate_in, gate_forget, cell, gate_out = gates.chunk(4, -1)
    c = gate_forget.sigmoid() * c + gate_in.sigmoid() * cell.tanh()
    return gate_out.sigmoid() * c.tanh(), c
