"""The error about a batch."""


class InvalidBatch(ValueError):  # noqa: N818 - it says what is wrong, as Empty or StopIteration do
    """The data, or what a likelihood makes of them, breaks a rule that the message states."""
