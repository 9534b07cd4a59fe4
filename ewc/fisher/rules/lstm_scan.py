"""An LSTM over time, forward and back, with as few operations a step as possible.

Autograd would record a dozen small operations a step. Here all that does not depend on the step
before is done for all steps at once, and five operations a step remain on the way back.

Index legend: `t` time step, `m` row of the batch, `h` state; gates in PyTorch's order i, f, g, o.
"""

from typing import Any

import torch
from torch import Tensor


class LSTMScan(torch.autograd.Function):
    """`(of_inputs, of_states, weight, h0, c0) -> (states, last cell)`; none of `weight`'s gradient.

    Shapes: `of_inputs` the inputs' share of the gates and `of_states` the bias of the states',
    both `[T, M, 4 H]`, `weight` `[4 H, H]`, `h0` and `c0` `[M, H]`, `states` `[T, M, H]`. All are
    of one dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, of_inputs: Tensor, of_states: Tensor, weight: Tensor, h0: Tensor, c0: Tensor
    ) -> Any:
        """Run the steps; keep what the way back needs."""
        steps, rows, width = of_inputs.shape[0], of_inputs.shape[1], weight.shape[1]
        gates = (of_inputs + of_states).contiguous()
        cells = gates.new_empty(steps + 1, rows, width)
        squashed = gates.new_empty(steps, rows, width)
        states = gates.new_empty(steps, rows, width)
        cells[0] = c0
        across = weight.t()
        h = h0
        for t in range(steps):
            gate = gates[t]
            gate.addmm_(h, across)
            i, f, g, o = gate.view(rows, 4, width).unbind(1)
            gate[:, : 2 * width].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            torch.mul(f, cells[t], out=cells[t + 1]).addcmul_(i, g)
            torch.tanh(cells[t + 1], out=squashed[t])
            h = torch.mul(o, squashed[t], out=states[t])
        ctx.save_for_backward(gates, cells, squashed, weight)
        return states, cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradients of both shares, `h0` and `c0`."""
        grad_states, grad_cell = grads
        gates, cells, squashed, weight = ctx.saved_tensors
        steps, rows, width = squashed.shape
        i, f, g, o = gates.view(steps, rows, 4, width).unbind(2)
        # What the gradients of cell (i, f, g) and state (o) are multiplied with, at every step.
        factors = torch.stack(
            [
                g * i * (1 - i),
                cells[:-1] * f * (1 - f),
                i * (1 - g * g),
                squashed * o * (1 - o),
            ],
            2,
        )
        to_cell = o * (1 - squashed * squashed)
        out = torch.empty_like(factors)
        dc = grad_cell
        dh = grad_states[-1]
        for t in range(steps - 1, -1, -1):
            dc = torch.addcmul(dc, dh, to_cell[t])
            torch.mul(factors[t, :, :3], dc.unsqueeze(1), out=out[t, :, :3])
            torch.mul(factors[t, :, 3], dh, out=out[t, :, 3])
            dc = dc * f[t]
            flat = out[t].view(rows, 4 * width)
            dh = torch.addmm(grad_states[t - 1], flat, weight) if t else flat @ weight
        of_both = out.view(steps, rows, 4 * width)
        return of_both, of_both, None, dh, dc
