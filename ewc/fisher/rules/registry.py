"""Which operation has a rule, and what a rule has in its hands.

There are two kinds:

- a *rule* replaces an operation whose parameters are protected. It computes the same output, and
  says for each parameter how the gradients of the single samples follow from what went in and
  from the gradient that comes back.
- a *rewriting* replaces an operation by simpler ones, which are then looked at in their turn.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ewc.fisher.gradients import Gradient

Handler = TypeVar("Handler", bound=Callable[..., Any])

RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
REWRITINGS: dict[Callable[..., Any], Callable[..., Any]] = {}
ALWAYS: set[Callable[..., Any]] = set()


class NotCovered(Exception):  # noqa: N818 - it says what is the case, as StopIteration does
    """Raised by a rule for arguments that it does not cover; another exact path is then taken."""


class Operation(Protocol):
    """What a rule is given: the samples in front, the values of the parameters, and a watch."""

    def samples(self, tensor: Tensor) -> Tensor:
        """All samples of a tensor that the model sees as `[...]`, shape `[N, ...]`.

        Raises:
            NotCovered: If it is itself a protected parameter, which then goes by copies.
        """
        ...

    def protects(self, tensor: Tensor) -> bool:
        """Whether a tensor is a protected parameter, or was made of one and of no samples."""
        ...

    def varies(self, tensor: Tensor) -> bool:
        """Whether a tensor has other values for each sample.

        What is made of parameters alone is best left to copies, of which only so many are made at
        a time: a rule would make as many as there are samples.
        """
        ...

    def value(self, parameter: Tensor) -> Tensor:
        """The value of a parameter, detached, `[*shape]`.

        Raises:
            NotCovered: If it differs from sample to sample, or is complex.
        """
        ...

    def watch(
        self, output: Tensor, gradients: dict[Tensor | None, Callable[[Tensor], Gradient]]
    ) -> Tensor:
        """Wait for the gradient of `output`; go on with the tensor that this returns.

        Args:
            output: Computed from what `samples` and `value` gave, samples in front.
            gradients: For each parameter, how its per-sample gradients follow from the gradient
                of `output`, which has the shape of `output`. An entry for None, or for a tensor
                that is not protected, is passed over.
        """
        ...


def rule(*functions: Callable[..., Any], always: bool = False) -> Callable[[Handler], Handler]:
    """Register the decorated function as the rule for `functions`.

    It is called as `handler(operation, *args, **kwargs)` with the arguments of the call that it
    replaces, and returns the same outputs, but for all samples: `[N, ...]` in place of `[...]`.

    Args:
        functions: What a `torch.overrides.TorchFunctionMode` sees, such as `F.linear`.
        always: Whether it also serves a call without protected parameters, because `vmap` is
            slow at these functions, or refuses them.
    """

    def register(handler: Handler) -> Handler:
        RULES.update(dict.fromkeys(functions, handler))
        if always:
            ALWAYS.update(functions)
        return handler

    return register


def rewriting(*functions: Callable[..., Any]) -> Callable[[Handler], Handler]:
    """Register the decorated function, with the same arguments, in the place of `functions`."""

    def register(handler: Handler) -> Handler:
        REWRITINGS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def takes(handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a handler knows all the options of a call; another exact path does, if not."""
    return not kwargs or _binds(handler, len(args), tuple(kwargs))


@cache
def _binds(handler: Callable[..., Any], positional: int, keywords: tuple[str, ...]) -> bool:
    """Whether a call with so many arguments, and with these keywords, fits the signature."""
    try:
        inspect.signature(handler).bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True
