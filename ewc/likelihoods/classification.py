"""Class labels under a softmax."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from ewc._vmap import peek
from ewc.data.structures import describe
from ewc.errors import InvalidBatch
from ewc.likelihoods._arguments import abridged, function, integer, output_indices
from ewc.likelihoods.heads import head_of, real_tensor
from ewc.likelihoods.pointwise import Fault, Pointwise, Reading, TargetTransform, spread


class Classification(Pointwise):
    """Class labels under a softmax: -log softmax(outputs)[target], summed over positions.

    Outputs are logits `[N, C]` or `[N, C, d1, ...]`. The head has H classes: all C, or those in
    `allowed_outputs`. The number of dimensions of the targets says what they are:

    - one fewer, `[N]` or `[N, d1, ...]`: class indices within the head, of any integer type;
    - the same, `[N, H]` or `[N, H, d1, ...]`: one-hot, of any type, or probabilities p, whose NLL
      is the expected one, the sum over c of -p[c] * log softmax(outputs)[c].

    Exact Fisher: the expectation over the H classes of each position, H backwards per position.
    Targets then only say which positions count, and may be absent; present ones are validated.

    Args:
        allowed_outputs: The head: indices of its outputs, in the order in which targets count
            them. None: all outputs.
        target_transform: Applied first to the targets of a batch, `transform(targets)`, and never
            to drawn ones. It sees any sub-batch, also inside vmap.
        ignore_index: Class indices of this value mark positions that contribute nothing.

    Raises:
        ValueError: `allowed_outputs` is empty, or has negative or repeated indices.
        TypeError: An argument is of another type.

    Example:
        The second of two heads, whose labels come as 2, 3, 4:

        >>> second = Classification([2, 3, 4], target_transform=lambda labels: labels - 2)
        >>> second.nll(torch.zeros(1, 5), torch.tensor([4]))
        tensor([1.0986])
    """

    def __init__(
        self,
        allowed_outputs: Iterable[int] | None = None,
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
    @property
    def takes_batches(self) -> bool:
        return type(self) is Classification and self.target_transform is None

    @override
    def _head(self, outputs: Any) -> Tensor:
        logits = real_tensor(outputs, type(self).__name__)
        if logits.dim() < 2:
            raise InvalidBatch(
                "Classification needs logits [N, C] or [N, C, d1, ...]; found outputs "
                f"{describe(logits)}. Mend: the model's outputs, in forward."
            )
        return head_of(logits, self.allowed_outputs, dim=1)

    @override
    def _read(self, head: Tensor, targets: Tensor, counts: Tensor | None) -> Reading:
        if targets.dim() == head.dim() - 1:
            return self._read_indices(head, targets, counts)
        if targets.dim() == head.dim():
            return _read_probabilities(head, targets, counts)
        raise InvalidBatch(
            f"Classification needs class indices {_indices_shape(head)}, or one-hot targets or "
            f"probabilities {list(head.shape)}; found targets {describe(targets)}. Mend: reshape "
            "them in target_transform."
        )

    @override
    def _losses(self, head: Tensor, targets: Tensor) -> Tensor:
        if targets.dim() < head.dim():
            return F.cross_entropy(head, targets, reduction="none")
        log_p = F.log_softmax(head, 1)
        # A class that a logit of -inf rules out costs nothing, not NaN, where its target is 0.
        return -torch.where(targets > 0, targets * log_p, 0).sum(1)

    @override
    def _draw(self, head: Tensor) -> Tensor:
        # Gumbel's trick, as in torch.multinomial, but without reading values from the device.
        noise = torch.empty_like(head).exponential_().clamp_min(torch.finfo(head.dtype).tiny)
        return (head - noise.log()).argmax(1)

    @override
    def _terms(self, head: Tensor) -> Tensor:
        log_p = F.log_softmax(head, 1)
        root = (log_p.detach() / 2).exp()  # sqrt(p), which does not underflow where p does
        return torch.where(log_p == -math.inf, 0, -root * log_p).movedim(1, 0)

    def _read_indices(self, head: Tensor, targets: Tensor, counts: Tensor | None) -> Reading:
        if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
            raise InvalidBatch(
                "targets with one dimension fewer than the logits are class indices, of an "
                f"integer type; found {describe(targets)} for logits {describe(head)}. Mend: "
                "target_transform=lambda t: t.long(), if they are indices."
            )
        if list(targets.shape) != _indices_shape(head):
            mend = "logits and targets must be of the same samples and positions"
            if targets.dim() == 2 and targets.shape == head.shape[:2]:
                mend = (
                    "for logits of sequences, [N, S, C], as language models return them, "
                    "TimeSeries(Classification(...), batch_first=True)"
                )
            raise InvalidBatch(
                f"logits {list(head.shape)} need class indices {_indices_shape(head)}; found "
                f"targets {list(targets.shape)}. Mend: {mend}."
            )
        labels = targets.long()
        labelled = labels != self.ignore_index
        counts = labelled if counts is None else labelled & spread(counts, labelled)
        outside = ((labels < 0) | (labels >= head.shape[1])) & counts
        return Reading(labels, counts, Fault(outside, lambda: self._outside(head, labels, outside)))

    def _outside(self, head: Tensor, labels: Tensor, outside: Tensor) -> str:
        """The message about labels outside the head."""
        last = head.shape[1] - 1
        shown = peek(torch.where(outside, labels, 0)).flatten().tolist()
        found = sorted({label for label in shown if not 0 <= label <= last})
        if self.allowed_outputs is None:
            rule, mend = "an index of one of the outputs", "the labels, or the size of the head"
        else:
            rule = f"a place in allowed_outputs ({abridged(self.allowed_outputs)})"
            mend = "map labels to places in allowed_outputs, in target_transform"
        return (
            f"a label must be {rule}, 0 to {last}, or ignore_index ({self.ignore_index}); found "
            f"{abridged(found)}. Mend: {mend}."
        )


def _read_probabilities(head: Tensor, targets: Tensor, counts: Tensor | None) -> Reading:
    classes, found = head.shape[1], targets.shape[1]
    if targets.shape != head.shape or targets.is_complex():
        mend = "logits and targets must be of the same samples and positions"
        if found != classes:
            mend = (
                "class indices have no such dimension: target_transform=lambda t: t[:, 0]"
                if found == 1
                else "pick the head's columns in target_transform, or set allowed_outputs"
            )
        raise InvalidBatch(
            "targets with as many dimensions as the logits are one-hot or probabilities over the "
            f"head, {list(head.shape)} with {classes} classes; found {describe(targets)} with "
            f"{found}. Mend: {mend}."
        )
    # 16-bit probabilities are coarse, so their sum is; it is taken in at least 32 bits.
    tolerance = 1e-2 if targets.is_floating_point() and targets.element_size() < 4 else 1e-3
    probabilities = targets.to(head.dtype)
    off = (probabilities.sum(1) - 1).abs()
    wrong = (probabilities < 0).any(1) | ~(off <= tolerance)  # `~`: NaN is wrong too
    if counts is not None:
        wrong = wrong & spread(counts, wrong)
    fault = Fault(
        wrong,
        lambda: (
            "targets with as many dimensions as the logits are one-hot or probabilities: >= 0, "
            f"with sum 1 over dimension 1 (within {tolerance:g}); found positions where they are "
            "not. Mend: normalise them in target_transform; several labels at once need a Custom "
            "likelihood."
        ),
    )
    if targets.is_floating_point():
        return Reading(probabilities, counts, fault)
    return Reading(targets.long().argmax(1), counts, fault)


def _indices_shape(head: Tensor) -> list[int]:
    return [*head.shape[:1], *head.shape[2:]]
