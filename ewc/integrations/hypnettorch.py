"""A ready-made `forward` for networks with context modulation.

Such a network (hypnettorch's `mnets`, for instance) has weights of its own and takes modulation
weights from a user or a hypernetwork; its `forward` expects both as arguments. The Fisher
information is that of its own weights, given the modulation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from ewc.data.calling import Forward, split_inputs
from ewc.data.structures import describe
from ewc.errors import InvalidBatch

ModWeights: TypeAlias = Sequence[Tensor] | Callable[[Any], Sequence[Tensor]]


def context_mod_forward(mod_weights: ModWeights) -> Forward:
    """Make a `forward(model, batch)` that runs a context-modulated network.

    The function calls `model(inputs, weights={"mod_weights": ..., "internal_weights":
    model.internal_params})`. So the model must have an attribute `internal_params` (its own
    weights) and accept an argument `weights`. The networks of hypnettorch do both, and this
    function replaces the `context_mod_forward` of that library.

    Args:
        mod_weights: The modulation weights, a list of tensors; or a function of the batch that
            returns them, such as `lambda batch: hnet(cond_id=task)`. The function may be called on
            any part of a batch, also inside `torch.func.vmap`.

    Returns:
        A `forward` for `EWC`; it can be pickled if `mod_weights` can.

    Raises:
        TypeError: `mod_weights` is neither callable nor a list or tuple of tensors.

    Example:
        >>> forward = context_mod_forward([torch.ones(5)])
        >>> regularizer = EWC(model, Classification(), forward=forward)
    """
    if not callable(mod_weights):
        if not isinstance(mod_weights, (list, tuple)):
            raise TypeError(
                "mod_weights must be a list of tensors, or a function of the batch that returns "
                f"one; found {describe(mod_weights)}."
            )
        for index, weight in enumerate(mod_weights):
            if not isinstance(weight, Tensor):
                raise TypeError(
                    f"mod_weights must be tensors; found {describe(weight)} at index {index}."
                )
    return _ContextModForward(mod_weights)


@dataclass(frozen=True)
class _ContextModForward:
    """A class, not a closure, so that an `EWC` with this forward can be pickled."""

    mod_weights: ModWeights

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        inputs, _ = split_inputs(batch)
        if not isinstance(inputs, Tensor):
            raise InvalidBatch(
                "context_mod_forward must have one tensor of inputs; found the inputs "
                f"{describe(inputs)}. Fix: yield (inputs, *rest), or write your own forward:\n"
                "    def forward(model, batch):\n"
                '        weights = {"mod_weights": ..., '
                '"internal_weights": model.internal_params}\n'
                "        return model(batch[0], weights=weights)"
            )
        mod_weights = self.mod_weights(batch) if callable(self.mod_weights) else self.mod_weights
        weights = {"mod_weights": mod_weights, "internal_weights": model.internal_params}
        return model(inputs, weights=weights)
