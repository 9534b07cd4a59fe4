"""What is worth a warning: the result is right, but perhaps not what the user believes.

Each has a class of its own, so that it can be silenced, or made an error, by itself.
"""


class ZeroFisherWarning(UserWarning):
    """A parameter has no influence on the likelihood: nothing protects it."""


class SlowPathWarning(UserWarning):
    """A consolidation ran most samples one at a time: the result is the same, and takes longer."""


class NothingProtectedWarning(UserWarning):
    """The penalty is 0 wherever the parameters go: nothing is protected."""
