"""What a batch is, how it is cut into samples, and how a model is called on it.

The Fisher information is a mean over single samples, while loaders hand over batches of any
structure. This module is the only one that knows such structures: it finds the tensors in them
that hold one entry per sample, cuts them, and puts one sample back together as a batch of one, so
that a user's model, `forward` and likelihood always see a batch as their loader makes it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ewc._structures import describe, holds_tensors, is_scalar, rebuild

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""`forward(model, batch) -> outputs`, the whole batch in hand."""

_LABELS = "labels"

_READABLE = (
    "a batch is a list or tuple (inputs, *rest), a mapping (its 'labels' are the targets) or one "
    "tensor; in it may be tensors, plain scalars, lists of one object per sample, and lists, "
    "tuples and mappings of these"
)


class InvalidBatch(ValueError):  # noqa: N818 - it says what is wrong, as Empty or StopIteration do
    """The data, or what a likelihood makes of them, breaks a rule that the message states."""


@dataclass(frozen=True)
class _Slot:
    """In the structure of a batch, the place of `Batch._leaves[index]`."""

    index: int


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
        if not isinstance(raw, (Tensor, list, tuple, Mapping)) or _is_empty(raw):
            raise InvalidBatch(
                f"{_READABLE}; found {describe(raw)}. Mend: let the loader (its collate_fn, or a "
                "generator around it) yield such a batch, and put the object that the model wants "
                f"together again in a forward:\n{_forward_to_write(raw)}"
            )
        if isinstance(raw, Tensor) and targets_required:
            raise InvalidBatch(
                'fisher_type="empirical" needs the targets in the data; found a batch that is one '
                f"bare tensor, {describe(raw)}. Mend: yield (inputs, targets), or take "
                'fisher_type="exact" or "mc", which need none.'
            )
        reader = _Reader(batch_dim, device)
        structure = reader.read(raw, "batch", is_batch=True)
        return cls(reader.agreed_size(raw), structure, tuple(reader.leaves), tuple(reader.dims))

    @property
    def raw(self) -> Any:
        """The batch as the loader made it, its tensors on the device.

        They are copies: a model may write into its inputs, which are the user's, and which it
        will be shown again.
        """
        return _fill(
            self._structure,
            [_copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves],
        )

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that are split into samples, whole: all samples along their `dims`.

        As in `raw`, they are copies.
        """
        return [_copy(leaf) for leaf in self._leaves if isinstance(leaf, Tensor)]

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


def apply(
    model: nn.Module, raw: Any, forward: Forward | None = None
) -> tuple[Any, tuple[Any, ...]]:
    """Run a model on a raw batch.

    Args:
        model: The model.
        raw: A batch, or `Batch.raw`, or what `Batch.of_one` returned.
        forward: `forward(model, batch) -> outputs`. Without it: `model(inputs)`; `model(*inputs)`
            for a list or tuple; `model(**inputs)` for a mapping, and for a batch that is itself a
            mapping, without its `labels`. A list of one object per sample is one argument.

    Returns:
        The outputs, or their `.logits` where they have them, and what follows the inputs.

    Raises:
        InvalidBatch: The batch has another number of inputs than the model's `forward` takes.
    """
    inputs, rest = split_inputs(raw)
    if forward is not None:
        outputs = forward(model, raw)
    else:
        arguments: tuple[Any, ...] = (inputs,)
        keywords: Mapping[str, Any] = {}
        if isinstance(inputs, Mapping):
            arguments, keywords = (), inputs
        elif isinstance(inputs, (list, tuple)) and holds_tensors(inputs):
            arguments = tuple(inputs)
        try:
            outputs = model(*arguments, **keywords)
        except TypeError as error:
            if _accepts(model, arguments, keywords):
                raise
            raise InvalidBatch(
                "without a forward, the inputs of a batch are the arguments of "
                f"{type(model).__name__}.forward{_signature(model)}; found the batch "
                f"{describe(raw)}. Mend: yield (inputs, *rest) with inputs to match, or pass a "
                f"forward:\n{_forward_to_write(raw)}"
            ) from error
    logits = getattr(outputs, "logits", None)
    return (outputs if logits is None else logits), rest


def split_inputs(raw: Any) -> tuple[Any, tuple[Any, ...]]:
    """The inputs of a raw batch, and the rest: what the likelihood is called with."""
    if isinstance(raw, Mapping):
        inputs = {key: value for key, value in raw.items() if key != _LABELS}
        return inputs, ((raw[_LABELS],) if _LABELS in raw else ())
    if isinstance(raw, (list, tuple)):
        return raw[0], tuple(raw[1:])
    return raw, ()


class _Reader:
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

    def read(self, value: Any, path: str, *, is_batch: bool = False) -> Any:
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
                value, [self.read(item, _under(path, key)) for key, item in value.items()]
            )
        if isinstance(value, (list, tuple)):
            if is_batch or not value or holds_tensors(value):
                return rebuild(
                    value, [self.read(item, f"{path}[{i}]") for i, item in enumerate(value)]
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

    def _slot(self, leaf: Tensor | Sequence[Any], dim: int, path: str) -> _Slot:
        self.leaves.append(leaf)
        self.dims.append(dim)
        self.paths.append(path)
        return _Slot(len(self.leaves) - 1)


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, cut off from the user's graph, usable in autograd."""
    with torch.inference_mode(False):
        # Only from pinned memory: an asynchronous copy to the CPU may be read before it arrives.
        moved = tensor.detach().to(device, non_blocking=tensor.is_pinned())
        if moved.is_inference():
            moved = moved.clone()
        # Kept because re-entrant checkpointing works only on inputs that require gradients.
        return moved.requires_grad_(tensor.requires_grad)


def _copy(tensor: Tensor) -> Tensor:
    """A copy that requires a gradient itself, if the tensor does."""
    copied = tensor.detach().clone()
    return copied.requires_grad_() if tensor.requires_grad else copied


def _fill(structure: Any, leaves: Sequence[Tensor | Sequence[Any]]) -> Any:
    """The raw batch: each slot of the structure replaced by its leaf."""
    if isinstance(structure, _Slot):
        return leaves[structure.index]
    if isinstance(structure, Tensor):
        return _copy(structure)
    if isinstance(structure, Mapping):
        return rebuild(structure, [_fill(item, leaves) for item in structure.values()])
    if isinstance(structure, (list, tuple)):
        return rebuild(structure, [_fill(item, leaves) for item in structure])
    return structure


def _is_empty(raw: Any) -> bool:
    return not isinstance(raw, Tensor) and len(raw) == 0


def _under(path: str, key: Any) -> str:
    return f'{path}["{key}"]' if isinstance(key, str) else f"{path}[{key!r}]"


def _signature(model: nn.Module) -> inspect.Signature | str:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):  # compiled and scripted forwards may have none
        return "(...)"


def _accepts(model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Whether the model can be called like that, so that a TypeError came from inside it."""
    signature = _signature(model)
    if isinstance(signature, str):
        return True
    try:
        signature.bind(*arguments, **keywords)
    except TypeError:
        return False
    return True


def _forward_to_write(raw: Any) -> str:
    """A template of the `forward` that reads this batch."""
    take = "        ...  # take the model's inputs out of batch\n"
    call = "        return model(inputs)"
    if isinstance(raw, Mapping) and raw:
        first = next(iter(cast("Mapping[str, Any]", raw)))
        take, call = "", f"        return model(batch[{first!r}])"
    elif isinstance(raw, (list, tuple)) and len(raw) > 1:
        take = f"        inputs, {', '.join(f'rest_{i}' for i in range(1, len(raw)))} = batch\n"
    return f"    def forward(model, batch):\n{take}{call}"
