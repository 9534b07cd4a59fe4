"""A batch, split into samples.

The Fisher information is a mean over single samples, but a loader yields batches of any structure.
A `Batch` separates the leaves of that structure that have one entry per sample from those that all
samples share. It can be cut, joined with other batches, and put back into the loader's structure,
so that the model, `forward` and the likelihood always get a batch as the loader yields it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ewc.data.calling import split_inputs
from ewc.data.reader import Reader, Slot
from ewc.data.structures import children, is_scalar, rebuild


@dataclass(frozen=True)
class Batch:
    """One batch: its structure, and the leaves that are split into samples.

    Split are tensors of at least one dimension, and lists and tuples of one object per sample.
    All samples share tensors of no dimension, and plain scalars, strings and `None`.

    Attributes:
        size: The number of samples, which may be 0.
    """

    size: int
    _structure: Any
    _leaves: tuple[Tensor | Sequence[Any], ...]
    _leaf_dims: tuple[int, ...]

    @classmethod
    def read(
        cls, raw: Any, *, batch_dim: int, device: torch.device, targets_required: bool
    ) -> "Batch":
        """Read what a loader yielded.

        Args:
            raw: `(inputs, *rest)`, a mapping, or one tensor of inputs.
            batch_dim: The dimension of the samples in tensors of two dimensions or more; in 1-D
                tensors it is always dimension 0.
            device: Where the tensors are moved.
            targets_required: Whether a bare tensor, which has no targets, is an error.

        Raises:
            InvalidBatch: The structure is not supported, targets are required and missing, no leaf
                can be split, or the leaves have different numbers of samples.
        """
        reader = Reader(batch_dim, device)
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
    def rest(self) -> tuple[Any, ...]:
        """What follows the inputs in the batch, of all samples, not copied."""
        return split_inputs(_fill(self._structure, self._leaves))[1]

    @property
    def vectorisable(self) -> bool:
        """Whether `vmap` can run over the samples: every leaf that is split is a tensor."""
        return all(isinstance(leaf, Tensor) for leaf in self._leaves)

    def take(self, start: int, stop: int) -> "Batch":
        """The batch of the samples from `start` to `stop - 1`, not copied."""
        leaves = tuple(
            leaf.narrow(dim, start, stop - start) if isinstance(leaf, Tensor) else leaf[start:stop]
            for leaf, dim in zip(self._leaves, self._leaf_dims, strict=True)
        )
        return replace(self, size=stop - start, _leaves=leaves)

    def pick(self, samples: Sequence[int]) -> "Batch":
        """The batch of the samples with these indices, copied; the batch must be `vectorisable`."""
        leaves = tuple(
            leaf.index_select(dim, torch.tensor(samples, device=leaf.device))
            for leaf, dim in zip(self._leaves, self._leaf_dims, strict=True)
            if isinstance(leaf, Tensor)
        )
        return replace(self, size=len(samples), _leaves=leaves)

    def copied(self) -> "Batch":
        """A copy in memory of its own; a loader may reuse its own memory for the next batch."""
        leaves = (_copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves)
        return replace(self, _leaves=tuple(leaves))

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
        leaves = []
        for index, dim in enumerate(first._leaf_dims):
            parts = [cast("Tensor", batch._leaves[index]) for batch in batches]
            joined = torch.cat([part.detach() for part in parts], dim)
            leaves.append(joined.requires_grad_(parts[0].requires_grad))
        return replace(first, size=sum(batch.size for batch in batches), _leaves=tuple(leaves))

    def of_one(self, tensors: Sequence[Tensor]) -> Any:
        """A batch of one sample in the loader's structure; the batch must be `vectorisable`.

        Args:
            tensors: The sample inside `vmap`: for each of `self.tensors`, its entry without the
                dimension of the samples.
        """
        return _fill(
            self._structure,
            [tensor.unsqueeze(dim) for tensor, dim in zip(tensors, self.dims, strict=True)],
        )


def _copy(tensor: Tensor) -> Tensor:
    """A copy outside the tensor's graph, with the same `requires_grad`."""
    copied = tensor.detach().clone()
    return copied.requires_grad_() if tensor.requires_grad else copied


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
