"""Recurrent layers and cells: RNN, GRU and LSTM with all of PyTorch's options.

The gates of a step are the sum of two shares: that of the input, which is one product for all
steps, and that of the state, which goes step by step from a bias. The gradients of the two shares
give the per-sample gradients of all weights at once: `g` with the inputs, and `g` with the states
one step before.

Index legend: `T` time steps, `N` samples, `B` the batch dimension of one sample, `M = N * B`,
`I` inputs, `G` gates, `H` states.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc.fisher.gradients import Outer, Sum
from ewc.fisher.rules.lstm_scan import LSTMScan
from ewc.fisher.rules.registry import NotCovered, Operation, decomposition, rule


class _Weights(NamedTuple):
    """One layer's parameters in one direction; what is absent is None."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    projection: Tensor | None


Scan = Callable[..., tuple[Tensor, ...]]
"""`scan(of_inputs, of_states, across, project, *first states) -> (states over time, *last states)`.

Goes step by step, without gradients of parameters.

- `of_inputs`, `[T, M, G]`: the inputs' share of the gates.
- `of_states`, `[T, M, G]`: the bias of the states' share.
- `across`, `[G, H]`: the weight of the states.
- `project`: an LSTM's projection of its state, or None.
- States over time `[T, M, H]`, first and last states `[M, H]`.
"""

Projection = Callable[[Tensor], Tensor] | None


def _rnn(activation: Callable[[Tensor], Tensor]) -> Scan:
    def scan(
        of_inputs: Tensor, of_states: Tensor, across: Tensor, _: Projection, h: Tensor
    ) -> tuple[Tensor, ...]:
        states = []
        for share in (of_inputs + of_states).unbind(0):
            h = activation(share + h @ across.t())
            states.append(h)
        return torch.stack(states), h

    return scan


def _gru_step(of_input: Tensor, of_state: Tensor, h: Tensor) -> Tensor:
    """`h' = (1 - z) tanh(n_x + r n_h) + z h`, with the gates r, z and n of both shares."""
    reset_x, update_x, new_x = of_input.chunk(3, -1)
    reset_h, update_h, new_h = of_state.chunk(3, -1)
    reset, update = (reset_x + reset_h).sigmoid(), (update_x + update_h).sigmoid()
    new = (new_x + reset * new_h).tanh()
    return torch.lerp(new.to(h.dtype), h, update.to(h.dtype))  # they differ under autocast


def _gru(
    of_inputs: Tensor, of_states: Tensor, across: Tensor, _: Projection, h: Tensor
) -> tuple[Tensor, ...]:
    states = []
    for of_input, bias in zip(of_inputs.unbind(0), of_states.unbind(0), strict=True):
        h = _gru_step(of_input, torch.addmm(bias, h, across.t()), h)
        states.append(h)
    return torch.stack(states), h


def _lstm_step(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """`c' = f c + i tanh(g)`, `h' = o tanh(c')`, with the gates i, f, g and o."""
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _lstm(
    of_inputs: Tensor, of_states: Tensor, across: Tensor, project: Projection, h: Tensor, c: Tensor
) -> tuple[Tensor, ...]:
    if project is None:
        weight = across.to(h.dtype)
        apply = LSTMScan.apply
        over_time, c = apply(of_inputs, of_states, weight, h, c)  # type: ignore[no-untyped-call]  # untyped in PyTorch
        return over_time, over_time[-1], c
    states = []
    for share in (of_inputs + of_states).unbind(0):
        h, c = _lstm_step(share + h @ across.t(), c)
        h = project(h)
        states.append(h)
    return torch.stack(states), h, c


def _layer(
    op: Operation,
    scan: Scan,
    x: Tensor,
    firsts: Sequence[Tensor],
    weights: _Weights,
    samples: int,
) -> tuple[Tensor, ...]:
    """One layer in one direction, `(states over time, *last states)`.

    `grad W_input[n, g, i] = sum_tb g[n, t, b, g] x[n, t, b, i]`, and the same for the weight of the
    states, with the gradient of their share and the states before each step in the place of x.

    Args:
        op: The operation that is being replaced.
        scan: Its steps.
        x: The inputs in the order of the steps, `[T, M, I]`.
        firsts: The first states, each `[M, H]`.
        weights: The layer's parameters.
        samples: N.
    """

    def by_sample(tensor: Tensor) -> Tensor:
        """`[T, M, D] -> [N, T * B, D]`."""
        return torch.unflatten(tensor, 1, (samples, -1)).transpose(0, 1).flatten(1, 2)

    def value(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else op.value(weight)

    def projected(narrow: Tensor, h: Tensor) -> Tensor:
        out, wide = F.linear(h, narrow).unsqueeze(0), h.detach().unsqueeze(0)
        gradients = {weights.projection: lambda g: Outer(by_sample(g), by_sample(wide))}
        return op.record(out, gradients)[0]

    across, narrow = op.value(weights.hidden), value(weights.projection)
    of_inputs = op.record(
        F.linear(x, op.value(weights.input), value(weights.input_bias)),
        {
            weights.input: lambda g: Outer(by_sample(g), by_sample(x)),
            weights.input_bias: lambda g: Sum(by_sample(g)),
        },
    )
    bias = value(weights.hidden_bias)
    bias = across.new_zeros(len(across)) if bias is None else bias
    of_states = op.record(
        bias.to(of_inputs.dtype).expand(of_inputs.shape),
        {
            weights.hidden: lambda g: Outer(by_sample(g), by_sample(before)),
            weights.hidden_bias: lambda g: Sum(by_sample(g)),
        },
    )
    if not (x.is_cpu and (scan is _gru or narrow is not None)):
        # Under autocast all of PyTorch's kernels but these two cast the states as well.
        firsts = [state.to(of_inputs.dtype) for state in firsts]
    project = None if narrow is None else partial(projected, narrow)
    over_time, *lasts = scan(of_inputs, of_states, across, project, *firsts)
    before = torch.cat([firsts[0].unsqueeze(0), over_time[:-1]]).detach()
    return over_time, *lasts


def _recur(
    op: Operation,
    scan: Scan,
    x: Tensor,
    states: Sequence[Tensor],
    layers: Sequence[_Weights],
    directions: int,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """All layers and directions; `(output, *last states)`, samples in front."""
    if x.dim() == 3:
        raise NotCovered
    x = x.permute(2, 0, 1, 3) if batch_first else x.permute(1, 0, 2, 3)  # [T, N, B, I]
    samples, batch = x.shape[1:3]
    x = x.flatten(1, 2)
    firsts = [op.samples(state).transpose(0, 1).flatten(1, 2) for state in states]
    lasts: list[Sequence[Tensor]] = []
    for place in range(0, len(layers), directions):
        outputs = []
        for backwards in range(directions):
            first = [state[place + backwards] for state in firsts]
            steps = x.flip(0) if backwards else x
            over_time, *last = _layer(op, scan, steps, first, layers[place + backwards], samples)
            outputs.append(over_time.flip(0) if backwards else over_time)
            lasts.append(last)
        x = torch.cat(outputs, 2) if directions > 1 else outputs[0]
    output = torch.unflatten(x, 1, (samples, batch))  # [T, N, B, H]
    output = output.permute(1, 2, 0, 3) if batch_first else output.transpose(0, 1)
    stacked = (torch.stack(kind, 1) for kind in zip(*lasts, strict=True))  # [N * B, layers, H]
    apart = (torch.unflatten(state, 0, (samples, batch)) for state in stacked)
    return output, *(state.transpose(1, 2) for state in apart)


def _define(function: Callable[..., Any], scan: Scan) -> None:
    """Register the rule of one kind of layer."""

    @rule(function, always=True)
    def recur(op: Operation, input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        # A PackedSequence has the sizes of its steps in second place, and no `batch_first`.
        is_packed = not isinstance(arguments[2], bool)
        sizes, *others = arguments if is_packed else (None, *arguments)
        hx, params, has_biases, num_layers, dropout, train, bidirectional, *rest = others
        if train and dropout:
            raise NotCovered
        directions = 1 + bidirectional
        size = len(params) // (num_layers * directions)
        layers = [
            _Weights(
                input=params[at],
                hidden=params[at + 1],
                input_bias=params[at + 2] if has_biases else None,
                hidden_bias=params[at + 3] if has_biases else None,
                projection=params[at + size - 1] if size % 2 else None,
            )
            for at in range(0, len(params), size)
        ]
        states = (hx,) if isinstance(hx, Tensor) else hx
        x = op.samples(input)
        if sizes is None:
            return _recur(op, scan, x, states, layers, directions, *rest)
        batch = {int(size) for size in op.shared(sizes).tolist()}
        if len(batch) > 1:
            raise NotCovered  # sequences of different lengths within one sample
        steps = torch.unflatten(x, 1, (-1, *batch))
        output, *lasts = _recur(op, scan, steps, states, layers, directions)
        return output.flatten(1, 2), *lasts


def _define_cell(
    function: Callable[..., Any], step: Callable[[Tensor, Tensor, Any], Tensor | tuple[Tensor, ...]]
) -> None:
    """Register the decomposition of one step that a model writes out by hand.

    Args:
        function: The cell.
        step: `step(the input's share of the gates, the state's, states)`.
    """

    @decomposition(function)
    def cell(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        h = hx if isinstance(hx, Tensor) else hx[0]
        return step(F.linear(input, w_ih, b_ih), F.linear(h, w_hh, b_hh), hx)


_define(torch.rnn_tanh, _rnn(torch.tanh))
_define(torch.rnn_relu, _rnn(torch.relu))
_define(torch.gru, _gru)
_define(torch.lstm, _lstm)
_define_cell(torch.rnn_tanh_cell, lambda x, h, _: torch.tanh(x + h))
_define_cell(torch.rnn_relu_cell, lambda x, h, _: torch.relu(x + h))
_define_cell(torch.gru_cell, _gru_step)
_define_cell(torch.lstm_cell, lambda x, h, states: _lstm_step(x + h, states[1]))
