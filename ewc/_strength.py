"""lambda: a number, or one that follows the curvature of the penalty."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ewc._checks import number
from ewc._summary import Curvature, combined

FACTOR = 5.0
"""What `"auto"` divides by the largest entry of the curvature. `docs/strength.md` has the
measurements that it was chosen by."""

_MOST = torch.finfo(torch.float32).max
"""The largest strength of `"auto"`: in float32 a larger one is infinite, and times 0 it is NaN."""


@dataclass(frozen=True)
class Strength:
    """lambda, as the user has set it.

    Attributes:
        fixed: The number, or None for `"auto"`.
    """

    fixed: float | None

    @classmethod
    def checked(cls, value: object) -> "Strength":
        """A strength, if it is `"auto"` or a finite number `>= 0`.

        Raises:
            TypeError: `value` is neither a string nor a plain real number.
            ValueError: `value` is another string, not finite, or negative.
        """
        if isinstance(value, str):
            if value != "auto":
                raise ValueError(
                    f'strength must be a finite number >= 0, or "auto"; found {value!r}.'
                )
            return cls(None)
        return cls(number("strength", value, other='"auto"'))

    @property
    def is_automatic(self) -> bool:
        """Whether it is `"auto"`."""
        return self.fixed is None

    @property
    def written(self) -> float | str:
        """The strength as the user writes it, for comparison between processes."""
        return "auto" if self.fixed is None else self.fixed

    def in_use(self, curvatures: Iterable[Curvature]) -> float:
        """The number that multiplies the penalty.

        Args:
            curvatures: Those of all protected parameters.
        """
        if self.fixed is not None:
            return self.fixed
        largest = combined(curvatures).largest
        return min(FACTOR / largest, _MOST) if largest > 0 else 0.0
