"""Finds the samples in a batch of any structure, as a loader yields it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ewc.data.calling import forward_to_write
from ewc.data.structures import describe, holds_tensors, is_scalar, rebuild
from ewc.errors import InvalidBatch

_READABLE = (
    "a batch is a list or tuple (inputs, *rest), a mapping (its 'labels' are the targets) or one "
    "tensor; in it may be tensors, plain scalars, lists of one object per sample, and lists, "
    "tuples and mappings of these"
)


@dataclass(frozen=True)
class Slot:
    """In the structure of a batch, the place of a leaf: which one it is."""

    index: int


class Reader:
    """Walks a raw batch: collects the leaves that are split, and what names them in errors."""

    def __init__(self, batch_dim: int, device: torch.device) -> None:
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
            raise ValueError(
                "a likelihood's batch_dim is the index of the dimension that holds the samples, "
                f"an integer >= 0; found {batch_dim!r}."
            )
        self.batch_dim = batch_dim
        self.device = device
        self.leaves: list[Tensor | Sequence[Any]] = []
        self.dims: list[int] = []
        self.paths: list[str] = []

    def read(self, raw: Any, targets_required: bool) -> Any:
        """Turn a batch into its structure."""
        if not isinstance(raw, (Tensor, list, tuple, Mapping)) or _is_empty(raw):
            raise InvalidBatch(
                f"{_READABLE}; found {describe(raw)}. Mend: let the loader (its collate_fn, or a "
                "generator around it) yield such a batch, and put the object that the model wants "
                f"together again in a forward:\n{forward_to_write(raw)}"
            )
        if isinstance(raw, Tensor) and targets_required:
            raise InvalidBatch(
                'fisher_type="empirical" needs the targets in the data; found a batch that is one '
                f"bare tensor, {describe(raw)}. Mend: yield (inputs, targets), or take "
                'fisher_type="exact" or "mc", which need none.'
            )
        return self._read(raw, "batch", is_batch=True)

    def agreed_size(self, raw: Any) -> int:
        """The number of samples, on which all leaves must agree."""
        sizes = [
            leaf.shape[dim] if isinstance(leaf, Tensor) else len(leaf)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
        ]
        if not sizes:
            raise InvalidBatch(
                "a batch must hold at least one tensor with a dimension of samples; found "
                f"{describe(raw)}. Mend: stack the samples (torch.stack) in the loader."
            )
        if len(set(sizes)) > 1:
            found = "".join(
                f"\n    {path}: {size} in {describe(leaf)}"
                + (f" along dimension {dim}" if isinstance(leaf, Tensor) else "")
                for path, size, leaf, dim in zip(
                    self.paths, sizes, self.leaves, self.dims, strict=True
                )
            )
            raise InvalidBatch(
                f"everything in a batch must hold the same number of samples; found{found}\n"
                "Mend: give each of them one entry per sample (along the likelihood's batch_dim, "
                f"{self.batch_dim}; along 0 if it has one dimension). What all samples share is a "
                "tensor of no dimension or a plain scalar, or belongs into forward."
            )
        return sizes[0]

    def _read(self, value: Any, path: str, *, is_batch: bool = False) -> Any:
        """Turn a value into its structure: slots for what is split, the value for the shared."""
        if isinstance(value, PackedSequence):
            raise InvalidBatch(
                f"the samples of a batch must be in dimensions; found a PackedSequence at {path}. "
                "Mend: pass the padded tensor and its lengths, and pack in forward:\n"
                "    def forward(model, batch):\n"
                "        padded, targets, lengths = batch\n"
                "        return model(pack_padded_sequence(padded, lengths.cpu(), "
                "enforce_sorted=False))"
            )
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, Mapping):
            return rebuild(
                value, [self._read(item, _under(path, key)) for key, item in value.items()]
            )
        if isinstance(value, (list, tuple)):
            if is_batch or not value or holds_tensors(value):
                return rebuild(
                    value, [self._read(item, f"{path}[{i}]") for i, item in enumerate(value)]
                )
            return self._slot(value, 0, path)
        if is_scalar(value):
            return value
        raise InvalidBatch(
            f"{_READABLE}; found {type(value).__name__} at {path}. Mend: let the loader yield its "
            "tensors (torch.as_tensor for an array), or a list of one such object per sample, and "
            "put together in forward what the model wants:\n"
            "    def forward(model, batch):\n"
            f"        return model(make_{type(value).__name__.lower()}({path}))"
        )

    def _tensor(self, tensor: Tensor, path: str) -> Any:
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else str(tensor.layout)
            raise InvalidBatch(
                f"the tensors of a batch must be dense; found a tensor of kind {kind} at {path}. "
                "Mend: pass it dense (padded, with its lengths), and convert it in forward."
            )
        if tensor.dim() > 1 and self.batch_dim >= tensor.dim():
            raise InvalidBatch(
                "tensors of two dimensions or more must have the dimension that holds the "
                f"samples, here {self.batch_dim}; found {describe(tensor)} at {path}. Mend: "
                "the likelihood's batch_dim, or the shape."
            )
        owned = _own(tensor, self.device)
        if tensor.dim() == 0:
            return owned
        return self._slot(owned, self.batch_dim if tensor.dim() > 1 else 0, path)

    def _slot(self, leaf: Tensor | Sequence[Any], dim: int, path: str) -> Slot:
        self.leaves.append(leaf)
        self.dims.append(dim)
        self.paths.append(path)
        return Slot(len(self.leaves) - 1)


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, cut off from the user's graph, usable in autograd."""
    with torch.inference_mode(False):
        # Only from pinned memory: an asynchronous copy to the CPU may be read before it arrives.
        moved = tensor.detach().to(device, non_blocking=tensor.is_pinned())
        if moved.is_inference():
            moved = moved.clone()
        # Kept because re-entrant checkpointing works only on inputs that require gradients.
        return moved.requires_grad_(tensor.requires_grad)


def _is_empty(raw: Any) -> bool:
    return not isinstance(raw, Tensor) and len(raw) == 0


def _under(path: str, key: Any) -> str:
    return f'{path}["{key}"]' if isinstance(key, str) else f"{path}[{key!r}]"
