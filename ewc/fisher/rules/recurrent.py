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
from ewc.fisher.rules.lstm_scan import LSTMScan
from ewc.fisher.rules.registry import NotCovered, Operation, decomposition, rule


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


class _Layer:
    """One layer in one direction: the gates' share of the inputs, and what its gradient gives.

    Args:
        op: The operation that is being replaced.
        weights: The layer's parameters.
        samples: N, where M = N * B.
        gru: Whether the reset gates stand between the states and the new state.

    Attributes:
        hidden: The value of the weight of the states, `[G, H]`.
        before: The states that the steps start from, `[T, M, H]`; set by the scan.
        reset: A GRU's reset gates, `[T, M, H]`; set by the scan.
    """

    def __init__(self, op: Operation, weights: _Weights, samples: int, *, gru: bool) -> None:
        self.hidden = op.value(weights.hidden)
        self.hidden_bias = None if weights.hidden_bias is None else op.value(weights.hidden_bias)
        self.projection = None if weights.projection is None else op.value(weights.projection)
        self.before = self.reset = self.hidden
        self._op, self._weights, self._samples, self._gru = op, weights, samples, gru

    def share(self, x: Tensor) -> Tensor:
        """The share of the inputs `[T, M, I]`, in the order of the steps, in the gates `[T, M, G]`.

        All biases are in it, but for a GRU's of the states.
        """
        weights, gru = self._weights, self._gru
        bias = None if weights.input_bias is None else self._op.value(weights.input_bias)
        if bias is not None and self.hidden_bias is not None and not gru:
            bias = bias + self.hidden_bias
        return self._op.record(
            F.linear(x, self._op.value(weights.input), bias),
            {
                weights.input: lambda g: Outer(self._by_sample(g), self._by_sample(x)),
                weights.input_bias: lambda g: Total(self._by_sample(g)),
                weights.hidden: lambda g: Outer(
                    self._by_sample(self._of_states(g) if gru else g), self._by_sample(self.before)
                ),
                weights.hidden_bias: lambda g: Total(
                    self._by_sample(self._of_states(g) if gru else g)
                ),
            },
        )

    def project(self, h: Tensor) -> Tensor:
        """An LSTM's projection of its state."""
        if self.projection is None:
            return h
        rows, sizes = h.detach(), (self._samples, -1)
        return self._op.record(
            F.linear(h, self.projection),
            {
                self._weights.projection: lambda g: Outer(
                    torch.unflatten(g, 0, sizes), torch.unflatten(rows, 0, sizes)
                )
            },
        )

    def _by_sample(self, tensor: Tensor) -> Tensor:
        """`[T, M, D] -> [N, T * B, D]`."""
        return torch.unflatten(tensor, 1, (self._samples, -1)).transpose(0, 1).flatten(1, 2)

    def _of_states(self, g: Tensor) -> Tensor:
        """The gradient of a GRU's states' share, from that of the inputs' share."""
        reset, update, new = g.chunk(3, 2)
        return torch.cat([reset, update, new * self.reset], 2)


Scan = Callable[..., tuple[Tensor, ...]]
"""`scan(layer, shares, *first states) -> (states over time, *last states)`.

Shapes: shares `[T, M, G]`, states over time `[T, M, H]`, first and last states `[M, H]`.
"""


def _rnn(activation: Callable[[Tensor], Tensor]) -> Scan:
    def scan(layer: _Layer, shares: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        states = [h]
        for share in shares.unbind(0):
            states.append(activation(share + states[-1] @ layer.hidden.t()))
        layer.before = torch.stack(states[:-1]).detach()
        return torch.stack(states[1:]), states[-1]

    return scan


def _gru(layer: _Layer, shares: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    states, resets = [h], []
    for share in shares.unbind(0):
        h = states[-1]
        reset_x, update_x, new_x = share.chunk(3, 1)
        reset_h, update_h, new_h = F.linear(h, layer.hidden, layer.hidden_bias).chunk(3, 1)
        reset, update = (reset_x + reset_h).sigmoid(), (update_x + update_h).sigmoid()
        resets.append(reset)
        states.append(torch.lerp((new_x + reset * new_h).tanh(), h, update))
    layer.before = torch.stack(states[:-1]).detach()
    layer.reset = torch.stack(resets).detach()
    return torch.stack(states[1:]), states[-1]


def _lstm(layer: _Layer, shares: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    if layer.projection is None:
        over_time, c = LSTMScan.apply(shares, layer.hidden, h, c)  # type: ignore[no-untyped-call]
        layer.before = torch.cat([h.unsqueeze(0), over_time[:-1]]).detach()
        return over_time, over_time[-1], c
    states = [h]
    for share in shares.unbind(0):
        gates = (share + states[-1] @ layer.hidden.t()).chunk(4, 1)
        c = gates[1].sigmoid() * c + gates[0].sigmoid() * gates[2].tanh()
        states.append(layer.project(gates[3].sigmoid() * c.tanh()))
    layer.before = torch.stack(states[:-1]).detach()
    return torch.stack(states[1:]), states[-1], c


def _layers(
    op: Operation,
    scan: Scan,
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
    firsts = [op.samples(state).transpose(0, 1).flatten(1, 2) for state in states]
    lasts: list[tuple[Tensor, ...]] = []
    for place in range(0, len(weights), directions):
        outputs = []
        for backwards in range(directions):
            steps = x.flip(0) if backwards else x
            layer = _Layer(op, weights[place + backwards], samples, gru=scan is _gru)
            first = (state[place + backwards] for state in firsts)
            over_time, *last = scan(layer, layer.share(steps), *first)
            outputs.append(over_time.flip(0) if backwards else over_time)
            lasts.append(tuple(last))
        x = torch.cat(outputs, 2) if directions > 1 else outputs[0]
    output = torch.unflatten(x, 1, (samples, batch))  # [T, N, B, H]
    output = output.permute(1, 2, 0, 3) if batch_first else output.transpose(0, 1)
    stacked = (torch.stack(kind, 1) for kind in zip(*lasts, strict=True))  # [N * B, layers, H]
    apart = (torch.unflatten(state, 0, (samples, batch)) for state in stacked)
    return output, *(state.transpose(1, 2) for state in apart)


def _define(function: Callable[..., Any], scan: Scan) -> None:
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
        return _layers(op, scan, input, (hx,), weights, 1 + bidirectional, batch_first)


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


@decomposition(torch.rnn_tanh_cell)
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


@decomposition(torch.rnn_relu_cell)
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


@decomposition(torch.gru_cell)
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


@decomposition(torch.lstm_cell)
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
