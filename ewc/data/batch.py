"""What a batch is, and how it is cut into samples.

The Fisher information is a mean over single samples, while loaders hand over batches of any
structure: it is taken apart into what holds one entry per sample and what all samples share, cut,
joined with others, and put together again as a batch of one, so that a user's model, `forward` and
likelihood always see a batch as their loader makes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ewc.data.calling import split_inputs
from ewc.data.reader import Reader, Slot
from ewc.data.structures import is_scalar, rebuild


@dataclass(frozen=True)
class Batch:
    """One batch, read: which of its leaves are split into samples, and which all samples share.

    Split are tensors of at least one dimension, and lists or tuples without a tensor in them (one
    object per sample). Shared are tensors of no dimension and plain scalars, `None` and strings.

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
        """Find the samples in what a loader yielded.

        Args:
            raw: `(inputs, *rest)`, a mapping, or one tensor of inputs.
            batch_dim: The dimension that holds the samples, in tensors of two dimensions or more;
                1-D tensors always hold them along dimension 0.
            device: Where the tensors are moved.
            targets_required: Whether one bare tensor, which has no targets, is refused.

        Raises:
            InvalidBatch: The structure cannot be read, the batch has no targets but needs them,
                nothing in it can be split, or the leaves disagree about the number of samples.
        """
        reader = Reader(batch_dim, device)
        structure = reader.read(raw, targets_required)
        return cls(reader.agreed_size(raw), structure, tuple(reader.leaves), tuple(reader.dims))

    @property
    def raw(self) -> Any:
        """The batch as the loader made it, its tensors on the device.

        They are copies: a model may write into its inputs, which are the user's, and which it
        will be shown again.
        """
        return _fill(self._structure, self.copied()._leaves)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that are split into samples, whole: all samples along their `dims`.

        As in `raw`, they are copies.
        """
        return [leaf for leaf in self.copied()._leaves if isinstance(leaf, Tensor)]

    @property
    def dims(self) -> list[int]:
        """The dimension of samples of each of `tensors`."""
        return [
            dim
            for leaf, dim in zip(self._leaves, self._leaf_dims, strict=True)
            if isinstance(leaf, Tensor)
        ]

    @property
    def nbytes(self) -> int:
        """The memory that the tensors take, if no two entries of one are the same memory."""
        return sum(leaf.nbytes for leaf in self._leaves if isinstance(leaf, Tensor))

    @property
    def rest(self) -> tuple[Any, ...]:
        """What follows the inputs, of all samples, not copied."""
        return split_inputs(_fill(self._structure, self._leaves))[1]

    @property
    def vectorisable(self) -> bool:
        """Whether `vmap` can run over the samples: all that is split are tensors."""
        return all(isinstance(leaf, Tensor) for leaf in self._leaves)

    def take(self, start: int, stop: int) -> "Batch":
        """The batch of the samples `start` to `stop - 1`, not copied."""
        leaves = tuple(
            leaf.narrow(dim, start, stop - start) if isinstance(leaf, Tensor) else leaf[start:stop]
            for leaf, dim in zip(self._leaves, self._leaf_dims, strict=True)
        )
        return replace(self, size=stop - start, _leaves=leaves)

    def pick(self, samples: Sequence[int]) -> "Batch":
        """The batch of some of the samples, copied. The batch must be `vectorisable`."""
        leaves = tuple(
            leaf.index_select(dim, torch.tensor(samples, device=leaf.device))
            for leaf, dim in zip(self._leaves, self._leaf_dims, strict=True)
            if isinstance(leaf, Tensor)
        )
        return replace(self, size=len(samples), _leaves=leaves)

    def copied(self) -> "Batch":
        """The same batch in memory of its own: a loader may use its own again for the next."""
        leaves = (_copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves)
        return replace(self, _leaves=tuple(leaves))

    def joins(self, other: "Batch") -> bool:
        """Whether two batches can be made one: they are alike but for their samples."""
        return (
            self._leaf_dims == other._leaf_dims
            and all(map(_are_stackable, self._leaves, other._leaves, self._leaf_dims))
            and _are_alike(self._structure, other._structure)
        )

    @staticmethod
    def joined(batches: "Sequence[Batch]") -> "Batch":
        """One batch of the samples of several, copied. Each must join the first one."""
        first = batches[0]
        leaves = []
        for place, dim in enumerate(first._leaf_dims):
            parts = [cast("Tensor", batch._leaves[place]) for batch in batches]
            joined = torch.cat([part.detach() for part in parts], dim)
            leaves.append(joined.requires_grad_(parts[0].requires_grad))
        return replace(first, size=sum(batch.size for batch in batches), _leaves=tuple(leaves))

    def of_one(self, tensors: Sequence[Tensor]) -> Any:
        """The raw batch of one sample.

        Args:
            tensors: For each of `self.tensors`, one sample without the dimension of samples, as
                `vmap` hands it over. The batch must be `vectorisable`.
        """
        return _fill(
            self._structure,
            [tensor.unsqueeze(dim) for tensor, dim in zip(tensors, self.dims, strict=True)],
        )


def _copy(tensor: Tensor) -> Tensor:
    """A copy that requires a gradient itself, if the tensor does."""
    copied = tensor.detach().clone()
    return copied.requires_grad_() if tensor.requires_grad else copied


def _fill(structure: Any, leaves: Sequence[Tensor | Sequence[Any]]) -> Any:
    """The raw batch: each slot of the structure replaced by its leaf."""
    if isinstance(structure, Slot):
        return leaves[structure.index]
    if isinstance(structure, Tensor):
        return _copy(structure)
    if isinstance(structure, Mapping):
        return rebuild(structure, [_fill(item, leaves) for item in structure.values()])
    if isinstance(structure, (list, tuple)):
        return rebuild(structure, [_fill(item, leaves) for item in structure])
    return structure


def _are_stackable(one: Any, other: Any, dim: int) -> bool:
    """Whether two leaves can be put one behind the other, and nothing of them is lost by it."""
    return (
        type(one) is type(other) is Tensor
        and one.dtype == other.dtype
        and one.requires_grad == other.requires_grad
        and one.shape[:dim] == other.shape[:dim]
        and one.shape[dim + 1 :] == other.shape[dim + 1 :]
    )


def _are_alike(one: Any, other: Any) -> bool:
    """Whether two structures are the same, with the same in every place that all samples share."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Slot) or is_scalar(one):
        return bool(one == other)
    if isinstance(one, Mapping):
        if list(one) != list(other) or not all(map(_are_alike, one.values(), other.values())):
            return False
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other) or not all(map(_are_alike, one, other)):
            return False
    else:
        return one is other
    # And with the same in the attributes that a container of another kind may have.
    return not hasattr(one, "__dict__") or _are_alike(vars(one), vars(other))
