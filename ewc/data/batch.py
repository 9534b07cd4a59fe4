"""A batch, split into samples.

The Fisher information is a mean over single samples, but a loader yields batches of any structure.
A `Batch` separates the leaves of that structure that have one entry per sample from those that all
samples share. It can be cut, joined with other batches, and put back into the loader's structure,
so that the model, `forward` and the likelihood always get a batch as the loader yields it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ewc.data.calling import split_inputs
from ewc.data.lists import Known
from ewc.data.objects import unread
from ewc.data.reader import Reader, Slot
from ewc.data.structures import children, describe, holds_tensors, is_scalar, rebuild


@dataclass(frozen=True)
class Batch:
    """One batch: its structure, and the leaves that are split into samples.

    Split are tensors of at least one dimension, and lists and tuples of one object per sample
    (which may be tensors, mappings or lists). All samples share tensors of no dimension, and plain
    scalars, strings and `None`.

    Attributes:
        size: The number of samples, which may be 0.
    """

    size: int
    _structure: Any
    _leaves: tuple[Tensor | Sequence[Any], ...]
    _leaf_dims: tuple[int, ...]

    @classmethod
    def read(
        cls,
        raw: Any,
        *,
        batch_dim: int,
        device: torch.device,
        targets_required: bool,
        known: Known | None = None,
    ) -> "Batch":
        """Read what a loader yielded.

        Args:
            raw: `(inputs, *rest)`, a mapping, or one tensor of inputs.
            batch_dim: The dimension of the samples in tensors of two dimensions or more; in 1-D
                tensors it is always dimension 0.
            device: Where the tensors are moved.
            targets_required: Whether a bare tensor, which has no targets, is an error.
            known: What earlier batches have shown about lists; added to.

        Raises:
            InvalidBatch: The structure is not supported, targets are required and missing, no leaf
                can be split, or the leaves have different numbers of samples.
        """
        reader = Reader(batch_dim, device, known)
        structure = reader.read(raw, targets_required=targets_required)
        return cls(reader.size, structure, tuple(reader.leaves), tuple(reader.dims))

    @property
    def raw(self) -> Any:
        """The batch in the loader's structure, with its tensors on the device.

        The tensors are copies: a model may write to its inputs, which belong to the user and are
        needed again.
        """
        return _fill(self._structure, self.copied()._leaves)

    @property
    def tensors(self) -> list[Tensor]:
        """Copies of the tensors that are split, each with all samples along its entry of `dims`."""
        return [leaf for leaf in self.copied()._leaves if isinstance(leaf, Tensor)]

    @property
    def dims(self) -> list[int]:
        """The dimension of the samples in each of `tensors`."""
        return [
            dim
            for leaf, dim in zip(self._leaves, self._leaf_dims, strict=True)
            if isinstance(leaf, Tensor)
        ]

    @property
    def nbytes(self) -> int:
        """The memory of copies of all `tensors`, in bytes."""
        return sum(leaf.nbytes for leaf in self._leaves if isinstance(leaf, Tensor))

    @property
    def description(self) -> str:
        """The structure in one line, as in an error."""
        return describe(_fill(self._structure, self._leaves))

    @property
    def rest(self) -> tuple[Any, ...]:
        """What follows the inputs in the batch, of all samples, not copied."""
        return split_inputs(_fill(self._structure, self._leaves))[1]

    @property
    def vectorisable(self) -> bool:
        """Whether `vmap` can run over the samples, unless objects are read: there are tensors."""
        return any(isinstance(leaf, Tensor) for leaf in self._leaves)

    def take(self, start: int, stop: int) -> "Batch":
        """The batch of the samples from `start` to `stop - 1`, not copied."""
        leaves = tuple(
            leaf.narrow(dim, start, stop - start) if isinstance(leaf, Tensor) else leaf[start:stop]
            for leaf, dim in zip(self._leaves, self._leaf_dims, strict=True)
        )
        return replace(self, size=stop - start, _leaves=leaves)

    def pick(self, samples: Sequence[int]) -> "Batch":
        """The batch of the samples with these indices; its tensors are copied."""
        leaves = (
            leaf.index_select(dim, torch.tensor(samples, device=leaf.device))
            if isinstance(leaf, Tensor)
            else _like(leaf, [leaf[n] for n in samples])
            for leaf, dim in zip(self._leaves, self._leaf_dims, strict=True)
        )
        return replace(self, size=len(samples), _leaves=tuple(leaves))

    def copied(self) -> "Batch":
        """A copy in memory of its own; a loader may reuse its own memory for the next batch."""
        return replace(self, _leaves=tuple(map(_copied, self._leaves)))

    def joins(self, other: "Batch") -> bool:
        """Whether `joined` can join the two: they differ in nothing but their samples."""
        return (
            self._leaf_dims == other._leaf_dims
            and all(map(_can_be_concatenated, self._leaves, other._leaves, self._leaf_dims))
            and _are_equal(self._structure, other._structure)
        )

    @staticmethod
    def joined(batches: "Sequence[Batch]") -> "Batch":
        """One batch of the samples of all `batches`, copied; each of them must join the first."""
        first = batches[0]
        leaves: list[Tensor | Sequence[Any]] = []
        for index, leaf in enumerate(first._leaves):
            parts: list[Any] = [batch._leaves[index] for batch in batches]
            if isinstance(leaf, Tensor):
                joined = torch.cat([part.detach() for part in parts], first._leaf_dims[index])
                leaves.append(joined.requires_grad_(leaf.requires_grad))
            else:
                leaves.append(_like(leaf, list(chain.from_iterable(parts))))
        return replace(first, size=sum(batch.size for batch in batches), _leaves=tuple(leaves))

    def of_one(self, tensors: Sequence[Tensor]) -> Any:
        """A batch of one sample in the loader's structure, with placeholders for its objects.

        Args:
            tensors: The sample inside `vmap`: for each of `self.tensors`, its entry without the
                dimension of the samples.
        """
        entries = iter(tensors)
        leaves = [
            next(entries).unsqueeze(dim) if isinstance(leaf, Tensor) else unread(leaf)
            for leaf, dim in zip(self._leaves, self._leaf_dims, strict=True)
        ]
        return _fill(self._structure, leaves)


def _copy(tensor: Tensor) -> Tensor:
    """A copy outside the tensor's graph, with the same `requires_grad`."""
    copied = tensor.detach().clone()
    return copied.requires_grad_() if tensor.requires_grad else copied


def _copied(leaf: Tensor | Sequence[Any]) -> Tensor | Sequence[Any]:
    """A leaf in memory of its own."""
    if isinstance(leaf, Tensor):
        return _copy(leaf)
    return _like(leaf, [_fill(each, ()) if holds_tensors(each) else each for each in leaf])


def _like(leaf: Sequence[Any], entries: list[Any]) -> Sequence[Any]:
    """A list or a tuple, as `leaf` is one."""
    return entries if isinstance(leaf, list) else tuple(entries)


def _fill(structure: Any, leaves: Sequence[Tensor | Sequence[Any]]) -> Any:
    """The structure with the leaves in place of its slots; tensors in it are copied."""
    if isinstance(structure, Slot):
        return leaves[structure.index]
    if isinstance(structure, Tensor):
        return _copy(structure)
    items = children(structure)
    if items is None:
        return structure
    return rebuild(structure, [_fill(item, leaves) for item in items])


def _can_be_concatenated(one: Any, other: Any, dim: int) -> bool:
    """Whether two leaves can be concatenated along `dim` and cut apart again without a change."""
    if type(one) is type(other) and type(one) in (list, tuple):
        return True
    return (
        type(one) is type(other) is Tensor
        and one.dtype == other.dtype
        and one.requires_grad == other.requires_grad
        and one.shape[:dim] == other.shape[:dim]
        and one.shape[dim + 1 :] == other.shape[dim + 1 :]
    )


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two structures are equal, with equal values for what all samples share.

    Shared tensors are equal only if they are identical: comparing values would synchronise.
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, Slot) or is_scalar(one):
        return bool(one == other)
    items, others = children(one), children(other)
    if items is None or others is None:
        return one is other
    if isinstance(one, Mapping) and list(one) != list(other):
        return False
    if len(items) != len(others) or not all(map(_are_equal, items, others)):
        return False
    # Subclasses of containers may have attributes.
    return not hasattr(one, "__dict__") or _are_equal(vars(one), vars(other))
