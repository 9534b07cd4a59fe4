"""The registry of rules, and the interface between a rule and the engine.

There are two kinds of handler:

- a *rule* replaces an operation in which parameters meet samples. It computes the same output, and
  states the per-sample gradients of each parameter as a formula of the inputs and of the gradient
  of the output.
- a *decomposition* replaces such an operation by simpler ones, which are looked at in their turn.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ewc.fisher.gradients import Gradient

Handler = TypeVar("Handler", bound=Callable[..., Any])

RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
ALWAYS: set[Callable[..., Any]] = set()


class NotCovered(Exception):  # noqa: N818 - a condition, not an error: as StopIteration
    """Raised by a rule or decomposition for arguments that it does not cover.

    Another method is then used, with the same result.
    """


class Operation(Protocol):
    """The interface of a rule to the engine: samples, values of parameters, recorded gradients.

    Here *parameter* also means an effective weight: a tensor that the model computes from
    parameters alone, such as `weight.T`, `1 + weight` or a weight norm.
    """

    def samples(self, tensor: Tensor) -> Tensor:
        """All samples of a tensor that the model sees as `[...]`, shape `[N, ...]`.

        A tensor without samples is expanded. If it is a parameter, its use here is recorded too.
        """
        ...

    def is_protected(self, tensor: object) -> bool:
        """Whether a tensor is a protected parameter, or computed from one and from no samples."""
        ...

    def value(self, parameter: Tensor) -> Tensor:
        """The value of a parameter, detached, `[*shape]`.

        Raises:
            NotCovered: It differs from sample to sample, or is complex.
        """
        ...

    def shared(self, tensor: Tensor) -> Tensor:
        """The value of a tensor that is the same for all samples, `[*shape]`.

        If it differs, the samples are grouped by it and run again.
        """
        ...

    def record(
        self, output: Tensor, gradients: Mapping[Tensor | None, Callable[[Tensor], Gradient]]
    ) -> Tensor:
        """Record how the per-sample gradients of parameters follow from that of `output`.

        Args:
            output: The output of the operation, computed from the results of `samples` and `value`,
                shape `[N, ...]`.
            gradients: For each parameter, a function that takes the gradient of `output`, of the
                same shape, and returns the per-sample gradients. An entry for None, or for a tensor
                that is not protected, is ignored.

        Returns:
            The tensor that the rule must return instead of `output`.
        """
        ...


def rule(*functions: Callable[..., Any], always: bool = False) -> Callable[[Handler], Handler]:
    """Register the decorated function as the rule for `functions`.

    The function is called as `handler(operation, *args, **kwargs)`, with the arguments of the call
    that it replaces. It returns the outputs of this call for all samples: `[N, ...]` instead of
    `[...]`.

    Args:
        functions: Functions as a `torch.overrides.TorchFunctionMode` sees them, such as `F.linear`.
        always: Whether the rule also serves calls without protected parameters, because `vmap` is
            slow at these functions, or refuses them.
    """

    def register(handler: Handler) -> Handler:
        RULES.update(dict.fromkeys(functions, handler))
        if always:
            ALWAYS.update(functions)
        return handler

    return register


def decomposition(*functions: Callable[..., Any]) -> Callable[[Handler], Handler]:
    """Register the decorated function as the decomposition of `functions`.

    It takes the same arguments, and is run in place of the call. Each operation that it calls is
    handled in turn.

    Args:
        functions: Functions as a `torch.overrides.TorchFunctionMode` sees them, such as `F.linear`.
    """

    def register(handler: Handler) -> Handler:
        DECOMPOSITIONS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def accepts(
    handler: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether there is a handler, and its signature has all the options of a call."""
    return handler is not None and (not kwargs or _binds(handler, len(args), tuple(kwargs)))


@cache
def _binds(handler: Callable[..., Any], positional: int, keywords: tuple[str, ...]) -> bool:
    """Whether a call with `positional` arguments and these keywords fits the signature."""
    try:
        inspect.signature(handler).bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True
