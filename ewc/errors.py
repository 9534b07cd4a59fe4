"""The error about a batch, and the warnings, each a class of its own.

So each can be caught, silenced, or turned into an error by itself.
"""


class InvalidBatch(ValueError):  # noqa: N818 - it says what is wrong, as Empty or StopIteration do
    """A batch, or what is made of it, breaks a rule, which the message states."""


class ZeroFisherWarning(UserWarning):
    """The Fisher of a parameter is zero in every entry: nothing protects it."""


class SlowPathWarning(UserWarning):
    """A consolidation ran most samples one at a time: the result is the same, and takes longer."""


class NothingProtectedWarning(UserWarning):
    """The penalty is 0 wherever the parameters go: nothing is protected."""
