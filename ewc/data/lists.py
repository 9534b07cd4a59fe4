"""Which lists of a batch hold one entry per sample.

`[x, y]` may be two inputs, each with one row for each of N samples, or, if N is 2, what belongs to
the first sample and what belongs to the second. Only the numbers tell them apart:

- A list or tuple of N entries of one kind, beside tensors of N samples, whose own tensors do not
  all have N rows holds one entry per sample: detection targets, ragged samples.
- If the tensors in it do have N rows each, both may be meant. Earlier batches, of other sizes,
  decide. Else a list or tuple of mappings, and a list after the inputs, hold one entry per sample;
  the model's inputs, and a tuple, hold what all samples have one row of.
- Of any other length, or with entries of several kinds, it holds what all samples have one row of.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ewc.data.structures import children, holds_tensors

INPUTS = "batch[0]"
"""The path of the model's inputs in a batch `(inputs, *rest)`."""


@dataclass(frozen=True)
class Known:
    """What the batches of a loader have shown.

    Attributes:
        decided: For each path, whether the list there held one entry per sample in a batch that
            left no doubt.
        guessed: The paths of lists that might as well have held rows of all samples.
    """

    decided: dict[str, bool] = field(default_factory=dict)
    guessed: set[str] = field(default_factory=set)

    @property
    def inputs_are_whole(self) -> bool:
        """Whether the model's inputs are one list with an entry per sample."""
        return self.decided.get(INPUTS, False)

    @property
    def hint(self) -> str:
        """What to say where a batch that was guessed at is wrong; empty without a guess."""
        if not self.guessed:
            return ""
        return (
            f" {', '.join(sorted(self.guessed))} was read as one entry per sample, because it has "
            "as many entries as there are samples. If each entry has a row per sample: yield a "
            "tuple."
        )


class Lists:
    """Tells lists with one entry per sample from others.

    Args:
        raw: The batch.
        batch_dim: The dimension of the samples in tensors of two dimensions or more.
        known: What earlier batches have shown; added to.
    """

    def __init__(self, raw: Any, batch_dim: int, known: Known) -> None:
        self._batch_dim = batch_dim
        self._known = known
        self._samples = self._count(raw)

    def hold_samples(self, value: Sequence[Any], path: str) -> bool:
        """Whether a list or tuple of the batch, which holds tensors, has one entry per sample.

        Also if it should have, but has too many or too few, so that the error names it as a whole.
        """
        # The entries of records differ: of NamedTuples, of several inputs of a model.
        if self._samples is None or hasattr(value, "_fields") or not _are_alike(value):
            return False
        fits = len(value) == self._samples
        sizes = set(self._sizes(value))
        if sizes != {self._samples}:
            self._known.decided.update({path: True} if fits else {})
            return fits or _are_mappings(value)
        if not fits:
            self._known.decided[path] = False
            return False
        if path in self._known.decided:
            return self._known.decided[path]
        if _are_mappings(value):
            return True
        if isinstance(value, tuple) or path == INPUTS or None in map(_kind, value):
            return False
        self._known.guessed.add(path)
        return True

    def _count(self, raw: Any) -> int | None:
        """The number of samples of a batch; None if its parts disagree.

        Counted are tensors outside lists; without any, lists of objects; without any, all others.
        """
        parts: dict[str, list[Any]] = {"tensors": [], "objects": [], "lists": []}
        _sort(raw, parts, is_batch=True)
        sizes: set[int | None] = {self._size(tensor) for tensor in parts["tensors"]}
        sizes = sizes or {len(each) for each in parts["objects"]}
        if not sizes:
            sizes = {size for each in parts["lists"] for size in self._sizes(each)}
            if len(sizes) > 1 and any(map(_are_mappings, parts["lists"])):
                sizes = {len(each) for each in parts["lists"]}
        return sizes.pop() if len(sizes) == 1 else None

    def _size(self, tensor: Tensor) -> int | None:
        """The number of samples of a tensor that is cut into samples."""
        dim = self._batch_dim if tensor.dim() > 1 else 0
        return tensor.shape[dim] if dim < tensor.dim() else None

    def _sizes(self, value: Any) -> Iterator[int | None]:
        """The numbers of samples of the tensors and objects in `value`."""
        if isinstance(value, Tensor) and value.dim() > 0:
            yield self._size(value)
        items = children(value)
        if items and not isinstance(value, Mapping) and not holds_tensors(value):
            yield len(items)
        else:
            for item in items or ():
                yield from self._sizes(item)


def _sort(value: Any, parts: dict[str, list[Any]], *, is_batch: bool = False) -> None:
    """Sort what a batch consists of into tensors, lists of objects, and other lists."""
    if isinstance(value, Tensor):
        parts["tensors"].extend([value] if value.dim() > 0 else [])
        return
    items = children(value)
    is_record = is_batch or isinstance(value, Mapping) or hasattr(value, "_fields")
    if not items:
        return
    if is_record:
        for item in items:
            _sort(item, parts)
    else:
        parts["lists" if holds_tensors(value) else "objects"].append(value)


def _are_mappings(items: Sequence[Any]) -> bool:
    return all(isinstance(item, Mapping) for item in items)


def _are_alike(items: Sequence[Any]) -> bool:
    """Whether the entries are of one kind, but for None where a sample has nothing."""
    return len({_kind(item) for item in items} - {None}) == 1


def _kind(item: Any) -> Any:
    """Mapping, list, a tensor's dtype and number of dimensions, or another type; None for None."""
    if item is None:
        return None
    if isinstance(item, Tensor):
        return item.dtype, item.dim()
    kinds = [kind for kind in (Mapping, (list, tuple)) if isinstance(item, kind)]
    return kinds[0] if kinds else type(item)
