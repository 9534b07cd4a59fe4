"""What the tests of batches share."""

from collections import UserDict
from typing import Any

import torch
from torch import Tensor

from ewc.data.batch import Batch


def read(raw: Any, batch_dim: int = 0, targets_required: bool = True) -> Batch:
    cpu = torch.device("cpu")
    return Batch.read(raw, batch_dim=batch_dim, device=cpu, targets_required=targets_required)


def x(n: int = 4) -> Tensor:
    return torch.arange(3.0 * n).reshape(n, 3)


class Encoding(UserDict[str, Any]):
    """A mapping with attribute access, as Hugging Face's BatchEncoding."""

    def __init__(self, data: dict[str, Any], note: str) -> None:
        super().__init__(data)
        self.note = note

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None
