"""Class labels under a softmax."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from ewc._checks import function, integer
from ewc._vmap import peek
from ewc.data.structures import describe
from ewc.errors import InvalidBatch
from ewc.likelihoods.faults import Fault, match_dims
from ewc.likelihoods.heads import abridged, head_of, output_indices, real_tensor
from ewc.likelihoods.pointwise import Pointwise, Targets, TargetTransform


class Classification(Pointwise, takes_batches=True):
    """Class labels under a softmax: -log softmax(outputs)[target], summed over positions.

    Outputs are logits `[N, C]` or `[N, C, d1, ...]`. The head has H classes: all C, or those in
    `allowed_outputs`. Targets have one of two forms:

    - class indices within the head, `[N]` or `[N, d1, ...]`, of any integer type;
    - one-hot of any type, or probabilities p, `[N, H]` or `[N, H, d1, ...]`. The NLL of
      probabilities is the expected one, the sum over c of -p[c] * log softmax(outputs)[c].

    A boolean tensor `[N]` or `[N, d1, ...]` after the targets is a mask: positions where it is
    False contribute nothing. 1-D integers after the targets (ids, lengths, task labels) are
    ignored.

    The exact Fisher information is the expectation over the H classes of each position, the sum
    over c of p[c] * (gradient of log p[c])^2 with p = softmax(outputs). It takes H backward passes
    per position. Targets are then optional: they are validated, and only show which positions
    count.

    Source: Martens, "New insights and perspectives on the natural gradient method", JMLR 2020.

    Args:
        allowed_outputs: The head: indices of its outputs, in the order in which targets number
            them. None: all outputs.
        target_transform: A function `transform(targets)` that is applied first to the targets of a
            batch. It may be called on any part of a batch, also inside vmap.
        ignore_index: The class index of positions that contribute nothing.

    Raises:
        ValueError: `allowed_outputs` is empty, or has negative or repeated indices.
        TypeError: An argument has a wrong type.

    Example:
        The second of two heads, with the labels 2, 3, 4:

        >>> second = Classification([2, 3, 4], target_transform=lambda labels: labels - 2)
        >>> second.nll(torch.zeros(1, 5), torch.tensor([4]))
        tensor([1.0986])
    """

    def __init__(
        self,
        allowed_outputs: Iterable[int] | None = None,
        *,
        target_transform: TargetTransform | None = None,
        ignore_index: int = -100,
    ) -> None:
        self.allowed_outputs = output_indices(allowed_outputs)
        self.target_transform = (
            None if target_transform is None else function("target_transform", target_transform)
        )
        self.ignore_index = integer("ignore_index", ignore_index)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(allowed_outputs={self.allowed_outputs}, "
            f"target_transform={self.target_transform}, ignore_index={self.ignore_index})"
        )

    @override
    def head(self, outputs: Any, /) -> Tensor:
        logits = real_tensor(outputs, type(self).__name__)
        if logits.dim() < 2:
            raise InvalidBatch(
                "the outputs that Classification takes must be logits [N, C] or [N, C, d1, ...]; "
                f"found {describe(logits)}. Fix: change the model's outputs in forward."
            )
        return head_of(logits, self.allowed_outputs, dim=1)

    @override
    def positions(self, head: Tensor, /) -> Sequence[int]:
        return _indices_shape(head)

    @override
    def read_targets(self, head: Tensor, targets: Tensor, mask: Tensor | None, /) -> Targets:
        if targets.dim() == head.dim() - 1:
            return self._read_indices(head, targets, mask)
        if targets.dim() == head.dim():
            return _read_probabilities(head, targets, mask)
        raise InvalidBatch(
            f"the targets that Classification takes must be class indices {_indices_shape(head)}, "
            f"or one-hot or probabilities {list(head.shape)}; found {describe(targets)}. Fix: "
            "reshape them in target_transform."
        )

    @override
    def position_nll(self, head: Tensor, targets: Tensor, /) -> Tensor:
        if targets.dim() < head.dim():
            if _classes_lie_last(head):
                rows = head.movedim(1, -1).flatten(0, -2)
                nll = F.cross_entropy(rows, targets.flatten(), reduction="none")
                return nll.view(targets.shape)
            return F.cross_entropy(head, targets, reduction="none")
        log_p = _log_softmax(head)
        # A class that a logit of -inf rules out costs nothing, not NaN, where its target is 0.
        return -torch.where(targets > 0, targets * log_p, 0).sum(1)

    @override
    def position_sample(self, head: Tensor, /) -> Tensor:
        # Gumbel's trick, as in torch.multinomial, but without reading values from the device.
        noise = torch.empty_like(head).exponential_().clamp_min(torch.finfo(head.dtype).tiny)
        return (head - noise.log()).argmax(1)

    @override
    def position_terms(self, head: Tensor, /) -> Tensor:
        log_p = _log_softmax(head)
        root = (log_p.detach() / 2).exp()  # sqrt(p), which does not underflow where p does
        return torch.where(log_p == -math.inf, 0, -root * log_p).movedim(1, 0)

    def _read_indices(self, head: Tensor, targets: Tensor, mask: Tensor | None) -> Targets:
        if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
            raise InvalidBatch(
                "targets with one dimension fewer than the logits must be class indices, of an "
                f"integer type; found {describe(targets)} for logits {describe(head)}. Fix: "
                "target_transform=lambda t: t.long(), if they are indices."
            )
        if list(targets.shape) != _indices_shape(head):
            fix = "give logits and targets of the same samples and positions"
            if targets.dim() == 2 and targets.shape == head.shape[:2]:
                fix = (
                    "for logits of sequences, [N, S, C], as language models return them, "
                    "TimeSeries(Classification(...), batch_first=True)"
                )
            raise InvalidBatch(
                f"class indices for logits {list(head.shape)} must have the shape "
                f"{_indices_shape(head)}; found {list(targets.shape)}. Fix: {fix}."
            )
        labels = targets.long()
        labelled = labels != self.ignore_index
        mask = labelled if mask is None else labelled & match_dims(mask, labelled)
        fault = Fault(
            (labels < 0) | (labels >= head.shape[1]),
            lambda outside: self._outside(head, labels, outside),
        )
        return Targets(labels, mask, (fault,))

    def _outside(self, head: Tensor, labels: Tensor, outside: Tensor) -> str:
        """The message about labels outside the head."""
        last = head.shape[1] - 1
        shown = peek(torch.where(outside, labels, 0)).flatten().tolist()
        found = sorted({label for label in shown if not 0 <= label <= last})
        if self.allowed_outputs is None:
            rule, fix = "an index of one of the outputs", "the labels, or the size of the head"
        else:
            rule = f"a position in allowed_outputs ({abridged(self.allowed_outputs)})"
            fix = "map labels to positions in allowed_outputs, in target_transform"
        return (
            f"a label must be {rule}, 0 to {last}, or ignore_index ({self.ignore_index}); found "
            f"{abridged(found)}. Fix: {fix}."
        )


def _classes_lie_last(head: Tensor) -> bool:
    """Whether `[n, C, *positions]` is `[n, *positions, C]` in memory, as language models have it.

    A softmax along any other dimension than the last in memory takes an accelerator up to a hundred
    times as long, where there are many classes.
    """
    return head.dim() > 2 and head.stride(1) == 1


def _log_softmax(head: Tensor) -> Tensor:
    """The logarithms of the probabilities, `[n, C, *positions]`."""
    if _classes_lie_last(head):
        return F.log_softmax(head.movedim(1, -1), -1).movedim(-1, 1)
    return F.log_softmax(head, 1)


def _read_probabilities(head: Tensor, targets: Tensor, mask: Tensor | None) -> Targets:
    classes, found = head.shape[1], targets.shape[1]
    if targets.shape != head.shape or targets.is_complex():
        fix = "give logits and targets of the same samples and positions"
        if found != classes:
            fix = (
                "class indices have no such dimension: target_transform=lambda t: t[:, 0]"
                if found == 1
                else "select the head's columns in target_transform, or set allowed_outputs"
            )
        raise InvalidBatch(
            "targets with as many dimensions as the logits must be one-hot or probabilities over "
            f"the head, {list(head.shape)} with {classes} classes; found {describe(targets)} with "
            f"{found}. Fix: {fix}."
        )
    # 16-bit probabilities are coarse, so their sum is; it is taken in at least 32 bits.
    tolerance = 1e-2 if targets.is_floating_point() and targets.element_size() < 4 else 1e-3
    probabilities = targets.to(head.dtype)
    off = (probabilities.sum(1) - 1).abs()
    fault = Fault(
        (probabilities < 0).any(1) | ~(off <= tolerance),  # `~`: NaN is wrong too
        "targets with as many dimensions as the logits must be one-hot or probabilities: >= 0, "
        f"with sum 1 over dimension 1 (within {tolerance:g}); found positions where they are not. "
        "Fix: normalise them in target_transform; for several labels at once use Bernoulli().",
    )
    values = probabilities if targets.is_floating_point() else targets.long().argmax(1)
    return Targets(values, mask, (fault,))


def _indices_shape(head: Tensor) -> list[int]:
    return [*head.shape[:1], *head.shape[2:]]
