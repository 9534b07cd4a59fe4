"""What outputs of models mean: a likelihood as users write it, and the same in plain PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ewc import Classification, Likelihood, Regression, TimeSeries


@dataclass(frozen=True)
class Task:
    """What the outputs of a model mean.

    Attributes:
        likelihood: As a user writes it.
        nll: `nll(outputs, targets)`, the same for a batch of one sample, `[]`.
    """

    likelihood: Likelihood
    nll: Callable[[Tensor, Tensor], Tensor]


def shift(labels: Tensor) -> Tensor:
    """The target of a position is the next token; the last one has none."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def _classes(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def _tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], targets[0], ignore_index=-100, reduction="sum")


def _next_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    return _tokens(outputs[:, :-1], targets[:, 1:])


def _values(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum() / 2


CLASS = Task(Classification(), _classes)
"""A class for each sample, or for each of its pixels."""
TOKENS = Task(TimeSeries(batch_first=True), _tokens)
"""A class for each position, but for those that are ignored."""
NEXT_TOKENS = Task(
    TimeSeries(Classification(target_transform=shift), batch_first=True), _next_tokens
)
"""What a causal language model predicts of its own inputs."""
VALUES = Task(Regression(), _values)
"""Numbers."""
