"""The options of an object that hold for all of its consolidations."""

from dataclasses import dataclass
from typing import get_args

from ewc._checks import choice, positive_int
from ewc._options import FisherType, Reduction


@dataclass(frozen=True)
class Settings:
    """The options of an object for all of its consolidations.

    Attributes:
        fisher_type: Whose targets the Fisher is taken over.
        reduction: Whether it is the mean or the sum over samples.
        max_samples: The most samples per consolidation, or None.
    """

    fisher_type: FisherType
    reduction: Reduction
    max_samples: int | None

    @classmethod
    def checked(
        cls, fisher_type: FisherType, reduction: Reduction, max_samples: int | None
    ) -> "Settings":
        """The settings, if they are valid.

        Raises:
            TypeError: `max_samples` is not an integer.
            ValueError: An option is none of its words, or `max_samples` is less than 1.
        """
        return cls(
            choice("fisher_type", fisher_type, get_args(FisherType)),
            choice("reduction", reduction, get_args(Reduction)),
            None if max_samples is None else positive_int("max_samples", max_samples),
        )

    def configuration(self) -> dict[str, str]:
        """The options that give the numbers in a state their meaning."""
        return {"fisher_type": self.fisher_type, "reduction": self.reduction}
