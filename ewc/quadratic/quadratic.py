"""The quadratic that one parameter contributes to the penalty, for any number of tasks.

EWC adds one quadratic for each task, around the anchor of that task. A sum of quadratics is a
quadratic. Keeping the sum, and not its terms, makes time and memory independent of the number of
tasks. It is updated task by task and never recomputed from sums such as `sum of F * anchor^2`,
which cancel in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ewc._scalars import read
from ewc.processes.layout import full_tensor, with_layout_of
from ewc.quadratic.values import plain_tensor


@dataclass(frozen=True)
class Quadratic:
    """`sum of fisher * |theta - anchor|^2 + constant`, for one parameter `theta`.

    Attributes:
        fisher: The curvature, real, `>= 0`, at least float32; the parameter's shape, or fewer rows
            in dimension 0 if the parameter has grown since the last consolidation.
        anchor: The minimiser; the shape of `fisher`, at least float32.
        constant: The minimum. It is greater than 0 where tasks have different anchors.
    """

    fisher: Tensor
    anchor: Tensor
    constant: float = 0.0

    def plus(self, fisher: Tensor, anchor: Tensor) -> tuple["Quadratic", Tensor]:
        r"""The sum of this quadratic and that of one more task.

        With `A` for the Fisher information summed so far, `mu` for this anchor and `theta*` for
        the new one,

            A' = A + F,   mu' = mu + F/A' (theta* - mu),   c' = c + sum of A F/A' |theta* - mu|^2,

        and `mu' = theta*` where `A` is 0: exactly, so that the penalty of a first task is exactly
        0 at its anchor.

        Args:
            fisher: `F`, of the parameter's shape.
            anchor: `theta*`, of the parameter's shape.

        Returns:
            The sum, with this quadratic's constant, and `c' - c` as a tensor: `raised` reads those
            of all parameters at once.
        """
        old = self.grown(anchor)
        curvature = old.fisher + fisher
        # The bound avoids 0/0; an entry below the smallest normal number has no weight.
        share = fisher / curvature.clamp_min(torch.finfo(curvature.dtype).tiny)
        distance = anchor - old.anchor
        mean = torch.where(old.fisher == 0, anchor, old.anchor + share * distance)
        rise = full_tensor((old.fisher * share * distance.abs().square()).sum())
        return Quadratic(curvature, mean, old.constant), rise

    def grown(self, anchor: Tensor) -> "Quadratic":
        """This quadratic for a parameter that has grown: new rows have curvature 0.

        Args:
            anchor: The anchor of the new rows, of the parameter's present shape.
        """
        if self.fisher.shape == anchor.shape:
            return self
        new = anchor[self.fisher.shape[0] :]
        flat = torch.zeros_like(new, dtype=self.fisher.dtype)
        return Quadratic(
            torch.cat([self.fisher, flat]), torch.cat([self.anchor, new]), self.constant
        )

    def like(self, parameter: nn.Parameter) -> "Quadratic":
        """This quadratic on the parameter's device, at least as wide, and sharded as it is.

        A collective if the parameter is sharded in another way than the quadratic.
        """
        fisher = self.fisher.to(parameter.device, curvature_dtype(parameter, self.fisher.dtype))
        # At least as wide as the Fisher: a loaded state may have a wider Fisher than anchor.
        wide = anchor_dtype(parameter, self.anchor.dtype, fisher.dtype)
        anchor = self.anchor.to(parameter.device, wide)
        fisher, anchor = with_layout_of(fisher, parameter), with_layout_of(anchor, parameter)
        if fisher is self.fisher and anchor is self.anchor:
            return self
        return Quadratic(fisher, anchor, self.constant)

    def clone(self) -> "Quadratic":
        """A copy that shares no memory with this one."""
        return Quadratic(self.fisher.clone(), self.anchor.clone(), self.constant)


def raised(
    quadratics: Mapping[str, Quadratic], rises: Mapping[str, Tensor]
) -> dict[str, Quadratic]:
    """The quadratics by name, with the constants of some of them increased."""
    values = dict(zip(rises, read(list(rises.values())), strict=True))
    return {
        name: replace(each, constant=each.constant + values[name]) if name in values else each
        for name, each in quadratics.items()
    }


def fits(shape: torch.Size, present: torch.Size) -> bool:
    """Whether a parameter of shape `shape` may have become one of shape `present`.

    It may if they are equal, or the parameter has gained rows in dimension 0.
    """
    if shape == present:
        return True
    return len(shape) == len(present) > 0 and shape[1:] == present[1:] and shape[0] < present[0]


def protected_rows(parameter: Tensor, anchor: Tensor) -> Tensor:
    """The rows of a parameter that have an anchor: all of them, unless it has grown."""
    return parameter if parameter.shape == anchor.shape else parameter[: anchor.shape[0]]


def n_rows(tensor: Tensor) -> int:
    """The size of dimension 0; a scalar counts as one row."""
    return tensor.shape[0] if tensor.dim() else 1


def snapshot(parameter: nn.Parameter) -> Tensor:
    """A copy of a parameter's values, in at least float32, for the mean of many anchors."""
    return plain_tensor(parameter).to(anchor_dtype(parameter), copy=True).contiguous()


def anchor_dtype(parameter: Tensor, *others: torch.dtype) -> torch.dtype:
    """The dtype of an anchor: the widest of the parameter's, float32, and `others`."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    for other in others:
        dtype = torch.promote_types(dtype, other)
    return dtype


def curvature_dtype(parameter: Tensor, *others: torch.dtype) -> torch.dtype:
    """The dtype of a Fisher: that of an anchor, but real."""
    return anchor_dtype(parameter, *others).to_real()
