"""The error about a batch, and the warnings.

Each has a class of its own, so that it can be caught, silenced or turned into an error separately.
"""

import sys
import warnings


class InvalidBatch(ValueError):  # noqa: N818 - named after what is wrong, as queue.Empty is
    """A batch, or a value computed from it, breaks a rule; the message states the rule."""


class ZeroFisherWarning(UserWarning):
    """The diagonal Fisher of a parameter is zero: the task does not protect this parameter."""


class SlowPathWarning(UserWarning):
    """A consolidation ran many samples one at a time: slower, with the same Fisher estimate."""


class ReplacedParameterWarning(UserWarning):
    """A new parameter has the name of a protected one, and is pulled towards the old values."""


class NothingProtectedWarning(UserWarning):
    """The penalty is 0 at all values of the parameters, so nothing is protected."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn whoever has called the library, however deep inside of it this is called."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("ewc."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
