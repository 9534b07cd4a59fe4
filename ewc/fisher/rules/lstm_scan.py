"""An LSTM over time, forward and back, with as few operations a step as possible.

Autograd would record a dozen small operations a step. Here all that does not depend on the step
before is done for several steps at once, as many as stay in the cache, and five operations a step
remain on the way back. Each gate lies in one piece: PyTorch's kernels are slower on strided parts,
the more so on several threads.

Index legend: `t` time step, `m` row of the batch, `h` state; gates in PyTorch's order i, f, g, o.
"""

from typing import Any

import torch
from torch import Tensor

from ewc.fisher.gradients import work_elements


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
        gates = of_inputs.new_empty(steps, 4, rows, width)
        shares = (torch.unflatten(each, 2, (4, width)) for each in (of_inputs, of_states))
        torch.add(*shares, out=gates.transpose(1, 2))
        cells = gates.new_empty(steps + 1, rows, width)
        squashed = gates.new_empty(steps, rows, width)
        states = gates.new_empty(steps, rows, width)
        cells[0] = c0
        across = torch.unflatten(weight, 0, (4, width)).mT
        h = h0
        for t in range(steps):
            gate = gates[t].baddbmm_(h.expand(4, rows, width), across)
            i, f, g, o = gate.unbind(0)
            gate[:2].sigmoid_()
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
        i, f, g, o = gates.unbind(1)
        out = gates.new_empty(steps, rows, 4, width)
        block = max(1, min(steps, work_elements(gates) // max(1, rows * 4 * width)))
        factors = gates.new_empty(block, 4, rows, width)
        to_cells = gates.new_empty(block, rows, width)
        dc = grad_cell
        dh = grad_states[-1]
        for stop in range(steps, 0, -block):
            start = max(0, stop - block)
            these = slice(start, stop)
            # What the gradients of cell (i, f, g) and state (o) are multiplied with, step by step.
            of_i, of_f, of_g, of_o = factors[: stop - start].unbind(1)
            _sigmoid_slope(g[these], i[these], out=of_i)
            _sigmoid_slope(cells[these], f[these], out=of_f)
            _tanh_slope(i[these], g[these], out=of_g)
            _sigmoid_slope(squashed[these], o[these], out=of_o)
            _tanh_slope(o[these], squashed[these], out=to_cells[: stop - start])
            for t in range(stop - 1, start - 1, -1):
                factor, by_gate = factors[t - start], out[t].transpose(0, 1)
                dc = torch.addcmul(dc, dh, to_cells[t - start])
                torch.mul(factor[:3], dc, out=by_gate[:3])
                torch.mul(factor[3], dh, out=by_gate[3])
                dc = dc * f[t]
                flat = out[t].view(rows, 4 * width)
                dh = torch.addmm(grad_states[t - 1], flat, weight) if t else flat @ weight
        of_both = out.view(steps, rows, 4 * width)
        return of_both, of_both, None, dh, dc


def _sigmoid_slope(factor: Tensor, sigmoid: Tensor, *, out: Tensor) -> None:
    """`factor * y (1 - y)`, with `y` for the value of a sigmoid."""
    torch.ops.aten.sigmoid_backward.grad_input(factor, sigmoid, grad_input=out)


def _tanh_slope(factor: Tensor, tanh: Tensor, *, out: Tensor) -> None:
    """`factor * (1 - y^2)`, with `y` for the value of a tanh."""
    torch.ops.aten.tanh_backward.grad_input(factor, tanh, grad_input=out)
