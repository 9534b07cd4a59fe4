"""Reads a batch as a loader yields it: finds its leaves, and the number of samples."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ewc.data.advice import conversion, forward_template, is_array
from ewc.data.lists import Known, Lists
from ewc.data.structures import children, describe, holds_tensors, is_scalar, rebuild
from ewc.errors import InvalidBatch

_RULE = (
    "a batch must be a list or tuple (inputs, *rest), a mapping (with the targets as 'labels') or "
    "one tensor, made of tensors, plain scalars, lists of one object per sample, and lists, tuples "
    "and mappings of these"
)


@dataclass(frozen=True)
class Slot:
    """The placeholder of a leaf in the structure of a batch.

    Attributes:
        index: The index of the leaf.
    """

    index: int


class Reader:
    """Separates a batch into its structure and the leaves that are split into samples.

    Args:
        batch_dim: The dimension of the samples in tensors of two dimensions or more.
        device: Where the tensors are moved.
        known: What earlier batches have shown about lists; added to.

    Attributes:
        leaves: The leaves that are split: tensors, and lists or tuples of one object per sample.
        dims: For each leaf the dimension of the samples.
        size: The number of samples.
    """

    def __init__(self, batch_dim: int, device: torch.device, known: Known | None = None) -> None:
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
            raise ValueError(
                f"a likelihood's batch_dim must be an integer >= 0; found {batch_dim!r}. Fix: set "
                "it to the index of the dimension that holds the samples."
            )
        self.leaves: list[Tensor | Sequence[Any]] = []
        self.dims: list[int] = []
        self.size = 0
        self._batch_dim = batch_dim
        self._device = device
        self._known = known or Known()
        self._paths: list[str] = []  # for each leaf the expression that an error names it by

    def read(self, raw: Any, *, targets_required: bool) -> Any:
        """Read a batch into `leaves`, `dims` and `size`.

        Args:
            raw: The batch as the loader yielded it.
            targets_required: Whether a bare tensor, which has no targets, is an error.

        Returns:
            The structure: the batch with a `Slot` in place of each leaf. What all samples share
            stays in it.

        Raises:
            InvalidBatch: See `Batch.read`.
        """
        is_batch = isinstance(raw, (Tensor, list, tuple, Mapping)) or is_array(raw)
        if not is_batch or (not isinstance(raw, Tensor) and len(raw) == 0):
            raise InvalidBatch(
                f"{_RULE}; found {describe(raw)}. Fix: let the loader (its collate_fn, or a "
                "generator around it) yield such a batch, and build the object that the model "
                f"takes in a forward:\n{forward_template(raw)}"
            )
        if isinstance(raw, Tensor) and targets_required:
            raise InvalidBatch(
                'a batch must hold targets for fisher_type="empirical"; found one bare tensor, '
                f"{describe(raw)}. Fix: yield (inputs, targets); (inputs,) if the likelihood takes "
                "the outputs alone, ((x,) for x in loader); or choose "
                'fisher_type="exact" or "mc", which need no targets.'
            )
        self._lists = Lists(raw, self._batch_dim, self._known)
        self._raw = raw
        structure = self._read(raw, "batch", is_batch=True)
        self.size = self._common_size(raw)
        return structure

    def _common_size(self, raw: Any) -> int:
        """The number of samples, which must be the same in all leaves."""
        sizes = [
            leaf.shape[dim] if isinstance(leaf, Tensor) else len(leaf)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
        ]
        if not sizes:
            raise InvalidBatch(
                "a batch must hold at least one tensor with a dimension of samples; found "
                f"{describe(raw)}. Fix: stack the samples (torch.stack) in the loader."
            )
        if len(set(sizes)) > 1:
            found = "".join(
                f"\n    {path}: {size} in {describe(leaf)}"
                + (f" along dimension {dim}" if isinstance(leaf, Tensor) else "")
                for path, size, leaf, dim in zip(
                    self._paths, sizes, self.leaves, self.dims, strict=True
                )
            )
            raise InvalidBatch(
                f"all parts of a batch must hold the same number of samples; found{found}\n"
                "Fix: one entry per sample in each of them (along the likelihood's batch_dim, "
                f"{self._batch_dim}; along 0 if there is one dimension; a list of what belongs to "
                "each sample has as many entries). A value that all samples share must be a tensor "
                f"of no dimension or a plain scalar, or be used in forward.{self._time_first()}"
            )
        return sizes[0]

    def _time_first(self) -> str:
        """A hint, if the samples seem to lie along dimension 1 of all tensors that have one."""
        along = {0: set[int](), 1: set[int]()}
        for leaf in self.leaves:
            if isinstance(leaf, Tensor):
                along[min(1, leaf.dim() - 1)].add(leaf.shape[min(1, leaf.dim() - 1)])
        if self._batch_dim != 0 or not all(along.values()) or len(along[0] | along[1]) > 1:
            return ""
        return (
            " If the samples lie along dimension 1 (time first), a likelihood with batch_dim = 1: "
            "Custom(likelihood.nll, batch_dim=1), or a subclass,\n"
            "    class TimeFirst(Classification):\n"
            "        batch_dim = 1"
        )

    def _read(self, value: Any, path: str, *, is_batch: bool = False) -> Any:
        """The structure of `value`; its leaves are appended to `leaves`."""
        _refuse_packed(value, path)
        if isinstance(value, Tensor):
            return self._read_tensor(value, path)
        if isinstance(value, (Mapping, list, tuple)):
            keyed: Iterable[tuple[Any, Any]] = enumerate(value)
            if isinstance(value, Mapping):
                keyed = value.items()
            elif value and not is_batch:
                if not holds_tensors(value):
                    return self._slot(value, 0, path)
                if self._lists.hold_samples(value, path):
                    return self._slot(self._entry(value, path), 0, path)
            return rebuild(value, [self._read(item, _path(path, key)) for key, item in keyed])
        if is_scalar(value):
            return value
        if is_array(value):
            raise InvalidBatch(
                f"{_RULE}; found an array, {type(value).__name__}, at {path}. Fix: make tensors of "
                f"arrays, ({conversion(self._raw)} for b in loader)."
            )
        raise InvalidBatch(
            f"{_RULE}; found {type(value).__name__} at {path}. Fix: let the loader yield tensors, "
            "or a list of one such object per sample, and build "
            "what the model takes in a forward:\n"
            "    def forward(model, batch):\n"
            f"        return model(make_{type(value).__name__.lower()}({path}))"
        )

    def _entry(self, value: Any, path: str) -> Any:
        """What belongs to one sample, or a list of such, with its tensors on the device."""
        _refuse_packed(value, path)
        if isinstance(value, Tensor):
            _refuse_sparse(value, path)
            return _moved(value, self._device)
        items = children(value)
        if items is None or not holds_tensors(value):
            return value
        return rebuild(value, [self._entry(item, f"{path}[...]") for item in items])

    def _read_tensor(self, tensor: Tensor, path: str) -> Any:
        _refuse_sparse(tensor, path)
        if tensor.dim() > 1 and self._batch_dim >= tensor.dim():
            raise InvalidBatch(
                "tensors of two dimensions or more must have the dimension of the samples, the "
                f"likelihood's batch_dim, here {self._batch_dim}; found {describe(tensor)} at "
                f"{path}. Fix: change batch_dim, or the shape."
            )
        moved = _moved(tensor, self._device)
        if tensor.dim() == 0:
            return moved
        return self._slot(moved, self._batch_dim if tensor.dim() > 1 else 0, path)

    def _slot(self, leaf: Tensor | Sequence[Any], dim: int, path: str) -> Slot:
        """Append a leaf."""
        self.leaves.append(leaf)
        self.dims.append(dim)
        self._paths.append(path)
        return Slot(len(self.leaves) - 1)


def _refuse_packed(value: Any, path: str) -> None:
    if isinstance(value, PackedSequence):
        raise InvalidBatch(
            "the samples of a batch must lie along a dimension of its tensors; found a "
            f"PackedSequence at {path}. Fix: pass the padded tensor and its lengths, and pack "
            "in forward:\n"
            "    def forward(model, batch):\n"
            "        padded, targets, lengths = batch\n"
            "        return model(pack_padded_sequence(padded, lengths.cpu(), "
            "enforce_sorted=False))"
        )


def _refuse_sparse(tensor: Tensor, path: str) -> None:
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise InvalidBatch(
            f"the tensors of a batch must be dense; found one that is {kind} at {path}. "
            "Fix: pass a dense tensor (padded, with its lengths), and convert it in forward."
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, outside the user's graph, and no inference tensor."""
    with torch.inference_mode(False):
        # A copy to the CPU that does not block may be read before it has arrived; a pinned tensor
        # is on the CPU already.
        moved = tensor.detach().to(device, non_blocking=tensor.is_pinned())
        if moved.is_inference():
            moved = moved.clone()
        # Kept, because reentrant checkpointing works only on inputs that require gradients.
        return moved.requires_grad_(tensor.requires_grad)


def _path(path: str, key: Any) -> str:
    """The Python expression of the item `key` of the value at `path`."""
    return f'{path}["{key}"]' if isinstance(key, str) else f"{path}[{key!r}]"
