"""Heads: the part of a model's outputs that targets count over."""

from typing import Any

import torch
from torch import Tensor

from ewc.data.structures import describe
from ewc.errors import InvalidBatch


def real_tensor(outputs: Any, name: str) -> Tensor:
    """The outputs, if they are one tensor of real numbers.

    Raises:
        InvalidBatch: They are anything else; the message names the likelihood by `name`.
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise InvalidBatch(
            f"{name} needs outputs that are one tensor of real numbers; found "
            f"{describe(outputs)}. Mend: pick or compute it in a forward:\n"
            "    def forward(model, batch):\n"
            "        return model(batch[0])[...]"
        )
    return outputs


def head_of(outputs: Tensor, allowed: tuple[int, ...] | None, dim: int) -> Tensor:
    """The allowed outputs along `dim`, in at least float32, where an NLL keeps its digits.

    Raises:
        InvalidBatch: The model has fewer outputs.
    """
    if allowed is not None:
        available = outputs.shape[dim]
        if max(allowed) >= available:
            raise InvalidBatch(
                f"allowed_outputs must be indices of the {available} outputs, 0 to "
                f"{available - 1}; found {max(allowed)} for outputs {describe(outputs)}. Mend: "
                "allowed_outputs, or the size of the head."
            )
        # Not blocking: a copy that waits would be another synchronisation.
        index = torch.tensor(allowed).to(outputs.device, non_blocking=True)
        outputs = outputs.index_select(dim, index)
    return outputs.float() if outputs.element_size() < 4 else outputs
