"""Rules on the values of a batch, read from the device together.

Shapes and types are validated at once. Values lie on the device, and reading each by itself would
make the host wait each time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ewc._vmap import peek
from ewc.data.structures import describe
from ewc.errors import InvalidBatch


class Fault(NamedTuple):
    """A rule that values of a batch may break.

    Attributes:
        where: True at positions that break the rule, `[n, *positions]`. The values of all faults of
            a batch are read from the device together.
        message: What must be so, and what was found; or a function that returns this, given
            `where`.
    """

    where: Tensor
    message: str | Callable[[Tensor], str]

    def within(self, mask: Tensor | None) -> "Fault":
        """The fault at positions that count."""
        if mask is None:
            return self
        return self._replace(where=self.where & match_dims(mask, self.where))

    def text(self) -> str:
        """The message; the values in it, if any, are read from the device."""
        return self.message if isinstance(self.message, str) else self.message(self.where)


def match_dims(values: Tensor, like: Tensor) -> Tensor:
    """`[n, *positions]` as `[n, 1, ..., *positions]`, with as many dimensions as `like`."""
    ones = (1,) * (like.dim() - values.dim())
    return values.reshape(*values.shape[:1], *ones, *values.shape[1:])


def weights_fault(weights: Tensor) -> Fault:
    """The rule on the weights of positions, of which a mask is one.

    Raises:
        InvalidBatch: They are complex.
    """
    if weights.is_complex():
        raise InvalidBatch(
            f"a mask must be boolean or real weights; found {describe(weights)}. Fix: convert it, "
            "mask.bool()."
        )
    return Fault(
        ~(weights >= 0) | weights.isinf(),
        "weights in a mask must be finite and >= 0; found others. Fix: clamp them.",
    )


def any_true(conditions: Sequence[Tensor]) -> list[bool]:
    """Whether each condition is true anywhere in the batch; one synchronisation, also in vmap."""
    if not conditions:
        return []
    answers: list[bool] = torch.stack([peek(where).any() for where in conditions]).tolist()
    return answers
