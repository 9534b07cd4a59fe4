"""One quadratic for any number of tasks.

The EWC penalty is a sum of one quadratic per task, each around its own anchor. A sum of quadratics
is a quadratic: keeping that one, instead of the terms, is what makes time and memory independent of
the number of tasks. It is updated, never recomputed from sums such as `sum of F * anchor^2`: those
cancel in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ewc.processes.layout import full_tensor, with_layout_of


@dataclass(frozen=True)
class Quadratic:
    """What is known of one parameter: `sum of fisher * |theta - anchor|^2 + constant`.

    Attributes:
        fisher: The curvature, real, `>= 0`, at least float32; the parameter's shape, or fewer rows
            in dimension 0 when the parameter has grown since.
        anchor: Where the quadratic is smallest, the same shape, at least float32.
        constant: What the penalty is there, because several tasks disagree about the anchor.
    """

    fisher: Tensor
    anchor: Tensor
    constant: float = 0.0

    def plus(self, fisher: Tensor, anchor: Tensor) -> "Quadratic":
        r"""Add the quadratic of one more task.

        With `A` for the sum of Fishers and `mu` for the anchor of the sum,

            A' = A + F,   mu' = mu + F/A' (theta* - mu),   c' = c + sum of A F/A' |theta* - mu|^2,

        and `mu' = theta*` where `A` is 0: exactly, so that the first penalty is exactly 0 there.

        Args:
            fisher: `F`, the parameter's shape.
            anchor: `theta*`, the parameter's shape.
        """
        old = self.grown(anchor)
        total = old.fisher + fisher
        # Keeps 0/0 out; a curvature below the smallest normal number weighs nothing.
        share = fisher / total.clamp_min(torch.finfo(total.dtype).tiny)
        distance = anchor - old.anchor
        mean = torch.where(old.fisher == 0, anchor, old.anchor + share * distance)
        rise = full_tensor((old.fisher * share * distance.abs().square()).sum()).item()
        return Quadratic(total, mean, old.constant + rise)

    def grown(self, anchor: Tensor) -> "Quadratic":
        """The same quadratic on a parameter with more rows: flat there, anchored at `anchor`."""
        if self.fisher.shape == anchor.shape:
            return self
        new = anchor[self.fisher.shape[0] :]
        flat = torch.zeros_like(new, dtype=self.fisher.dtype)
        return Quadratic(
            torch.cat([self.fisher, flat]), torch.cat([self.anchor, new]), self.constant
        )

    def beside(self, parameter: nn.Parameter) -> "Quadratic":
        """The same quadratic on the parameter's device, in no less than the parameter's dtype.

        And sharded as the parameter is: a collective, if it was sharded otherwise before.
        """
        fisher = self.fisher.to(parameter.device, curvature_dtype(parameter, self.fisher.dtype))
        # No narrower than the Fisher, which a loaded state may have as float64 and it as float32.
        wide = anchor_dtype(parameter, self.anchor.dtype, fisher.dtype)
        anchor = self.anchor.to(parameter.device, wide)
        fisher, anchor = with_layout_of(fisher, parameter), with_layout_of(anchor, parameter)
        if fisher is self.fisher and anchor is self.anchor:
            return self
        return Quadratic(fisher, anchor, self.constant)

    def clone(self) -> "Quadratic":
        """A copy that shares no memory."""
        return Quadratic(self.fisher.clone(), self.anchor.clone(), self.constant)


def fits(known: torch.Size, now: torch.Size) -> bool:
    """Whether a parameter of shape `now` is one of shape `known`, perhaps grown in dimension 0."""
    if known == now:
        return True
    return len(known) == len(now) > 0 and known[1:] == now[1:] and known[0] < now[0]


def covered(parameter: Tensor, anchor: Tensor) -> Tensor:
    """The rows of a parameter that its quadratic knows: all, unless the parameter has grown."""
    return parameter if parameter.shape == anchor.shape else parameter[: anchor.shape[0]]


def snapshot(parameter: nn.Parameter) -> Tensor:
    """A copy of a parameter's values, in at least float32: half has no room for a mean."""
    return parameter.detach().to(anchor_dtype(parameter), copy=True).contiguous()


def anchor_dtype(parameter: Tensor, *others: torch.dtype) -> torch.dtype:
    """The dtype of an anchor: at least float32, never less than it has been, complex if needed."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    for other in others:
        dtype = torch.promote_types(dtype, other)
    return dtype


def curvature_dtype(parameter: Tensor, *others: torch.dtype) -> torch.dtype:
    """The dtype of a Fisher: as `anchor_dtype`, but real."""
    return anchor_dtype(parameter, *others).to_real()
