"""Likelihoods of positions that are independent given the outputs.

A position is a pixel, a token or an output dimension. A subclass of `Pointwise` says what one
position contributes; masks, weights, heads, transforms, and the sums over positions are done here.
`TimeSeries` runs the same methods with the steps of a sequence as samples. All of it works inside
`torch.func.vmap`, and reads values from the device once per call.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from ewc._options import FisherType
from ewc.data.structures import describe
from ewc.errors import InvalidBatch
from ewc.likelihoods.extras import read_masks, restrict
from ewc.likelihoods.faults import Fault, any_true, match_dims, weights_fault
from ewc.likelihoods.heads import head_of, real_tensor
from ewc.likelihoods.likelihood import Likelihood, redefines

TargetTransform: TypeAlias = Callable[[Any], Tensor]


class Targets(NamedTuple):
    """The targets of n samples, their shapes validated.

    Attributes:
        values: The targets as `position_nll` takes them.
        mask: True where a position counts, `[n]` or `[n, *positions]`; None: all of them.
        faults: Rules on values, an error where a position that counts breaks one.
    """

    values: Tensor
    mask: Tensor | None
    faults: tuple[Fault, ...] = ()


class _Observed(NamedTuple):
    """A batch of n samples, its values validated and 0 at positions that do not count."""

    head: Tensor
    targets: Tensor | None
    weights: Tensor | None  # [n] or [n, *positions]; None: every position counts once


class Pointwise(Likelihood):
    """The base class of likelihoods of positions that are independent given the outputs.

    The negative log-likelihood (NLL) of a sample is the sum over its positions. A subclass must
    define `position_nll`. `fisher_type="mc"` also needs `position_sample`, and `"exact"` needs
    `position_terms`. `head`, `positions` and `read_targets` define which outputs and targets are
    valid: by default real outputs `[N, ...]` and finite targets of the same shape. All six methods
    are called on whole batches, on batches of one sample inside vmap, and by `TimeSeries` with
    steps as samples.

    A batch may contain more after the targets. A boolean tensor of the positions' shape is a mask:
    positions where it is False contribute nothing, and may hold any outputs and targets. 1-D
    integers (ids, lengths, task labels), strings and other objects are ignored. Anything else is an
    error.

    Example:
        >>> class Poisson(Pointwise):
        ...     def position_nll(self, head, targets):
        ...         return head.exp() - targets * head
        >>> Poisson().nll(torch.zeros(2, 3), torch.ones(2, 3))
        tensor([3., 3.])

    Attributes:
        allowed_outputs: The head: indices of outputs. None: all.
        target_transform: A function `transform(targets)` that is applied first to the targets of a
            batch. It is not applied to drawn targets.
    """

    allowed_outputs: tuple[int, ...] | None = None
    target_transform: TargetTransform | None = None
    _needed: ClassVar[dict[FisherType, str]] = {
        "exact": "position_terms(head) -> [K, n, *positions]",
        "mc": "position_sample(head) -> targets",
    }

    @abstractmethod
    def position_nll(self, head: Tensor, targets: Tensor, /) -> Tensor:
        """The NLL of each position.

        Args:
            head: What `head` returned.
            targets: `Targets.values` of `read_targets`, or what `position_sample` returned.

        Returns:
            `[n, *positions]`.
        """

    def position_sample(self, head: Tensor, /) -> Tensor:
        """Targets drawn by the global RNG given a detached head, as `position_nll` takes them.

        Raises:
            NotImplementedError: The subclass does not define it.
        """
        raise NotImplementedError(self._undefined("mc"))

    def position_terms(self, head: Tensor, /) -> Tensor:
        """The exact terms of each position.

        The sum over K of their squared gradients with respect to the head is the expectation of
        the squared gradient of `position_nll` over targets. Positions are independent, so these
        sums add up to the exact Fisher information.

        Returns:
            `[K, n, *positions]`.

        Raises:
            NotImplementedError: The subclass does not define it.
        """
        raise NotImplementedError(self._undefined("exact"))

    def head(self, outputs: Any, /) -> Tensor:
        """The outputs that targets refer to, in at least float32.

        Returns:
            `[n, *positions]`; with a dimension of classes or the like wherever the subclass wants.

        Raises:
            InvalidBatch: The model's outputs are of another kind or shape.
        """
        name = type(self).__name__
        values = real_tensor(outputs, name)
        if values.dim() < (1 if self.allowed_outputs is None else 2):
            raise InvalidBatch(
                f"the outputs that {name} takes must be [N, ...], with a last dimension that "
                f"allowed_outputs selects from, if given; found {describe(values)}. Fix: "
                "change the model's outputs in forward."
            )
        return head_of(values, self.allowed_outputs, dim=-1)

    def positions(self, head: Tensor, /) -> Sequence[int]:
        """The shape `[n, *positions]` of what `position_nll` returns, which is that of a mask.

        Args:
            head: What `head` returned.
        """
        return head.shape

    def read_targets(self, head: Tensor, targets: Tensor, mask: Tensor | None, /) -> Targets:
        """Validate the targets of a batch, and say which positions count.

        Args:
            head: What `head` returned.
            targets: The targets of the batch, transformed.
            mask: `[n]` or `[n, *positions]`, False where nothing counts; None: all count.

        Raises:
            InvalidBatch: Their shape or type is wrong. Values are not read here: see `Fault`.
        """
        name = type(self).__name__
        if targets.shape != head.shape or targets.is_complex():
            which = "outputs" if self.allowed_outputs is None else "outputs in allowed_outputs"
            fix = "reshape them in target_transform, or the outputs in forward"
            if [*targets.shape, 1] == list(head.shape):
                fix = "target_transform=lambda targets: targets.unsqueeze(-1)"
            elif [*head.shape, 1] == list(targets.shape):
                fix = "target_transform=lambda targets: targets.squeeze(-1)"
            raise InvalidBatch(
                f"the targets that {name} takes must be real and of the shape of the {which}, "
                f"{list(head.shape)}; found {describe(targets)}, and they are never broadcast. "
                f"Fix: {fix}."
            )
        targets = targets.to(head.dtype)
        fault = Fault(
            ~targets.isfinite(),
            f"targets must be finite (as {head.dtype}); found NaN or infinite ones. Fix: leave "
            "their samples out, or mask them, with a boolean tensor after the targets.",
        )
        return Targets(targets, mask, (fault,))

    @property
    @override
    def takes_batches(self) -> bool:
        return super().takes_batches and self.target_transform is None

    @property
    @override
    def needs_targets(self) -> bool:
        return super().needs_targets or not redefines(self, Pointwise, "nll")

    @override
    def nll(self, outputs: Any, *rest: Any) -> Tensor:
        targets = self.targets_in(rest, required=True)
        return self.weighted_nll(outputs, targets, self._mask_in(outputs, rest))

    @override
    def sample(self, outputs: Any, /) -> Tensor:
        return self.position_sample(self.head(outputs).detach())

    @override
    def sampled_nll(self, outputs: Any, /, *rest: Any) -> Tensor:
        targets = self.targets_in(rest, required=False)
        return self.weighted_sampled_nll(outputs, targets, self._mask_in(outputs, rest))

    @override
    def exact_terms(self, outputs: Any, *rest: Any) -> Tensor:
        targets = self.targets_in(rest, required=False)
        return self.weighted_exact_terms(outputs, targets, self._mask_in(outputs, rest))

    @override
    def supports(self, fisher_type: FisherType) -> bool:
        if fisher_type == "mc":
            return redefines(self, Pointwise, "position_sample", "sample", "sampled_nll")
        if fisher_type == "exact":
            return redefines(self, Pointwise, "position_terms", "exact_terms")
        return super().supports(fisher_type)

    def targets_in(self, rest: tuple[Any, ...], *, required: bool) -> Tensor | None:
        """The targets of a batch, transformed; None if it has none.

        Raises:
            InvalidBatch: It has none, but they are required; or they are not a tensor.
        """
        name = type(self).__name__
        targets = rest[0] if rest else None
        if targets is None:
            if required:
                raise InvalidBatch(
                    f"a batch must hold targets after its inputs for {name}; found none. "
                    "Fix: yield (inputs, targets), or a mapping with 'labels'; or choose "
                    'fisher_type="exact" or "mc", which need none.'
                )
            return None
        if self.target_transform is not None:
            targets = self.target_transform(targets)
        if not isinstance(targets, Tensor):
            source = "the batch" if self.target_transform is None else "target_transform"
            raise InvalidBatch(
                f"the targets that {name} takes must be one tensor; found {describe(targets)} from "
                f"{source}. Fix: stack them in the loader, or select them in target_transform."
            )
        return targets

    def weighted_nll(self, outputs: Any, targets: Tensor | None, weights: Tensor | None) -> Tensor:
        """The NLL `[n]` of n samples, each times its weight.

        Args:
            outputs: The model's outputs for n samples.
            targets: What `targets_in` returned.
            weights: `[n]` or `[n, *positions]`, boolean or >= 0. Where it is 0, outputs and targets
                may hold anything.
        """
        observed = self._observe(outputs, targets, weights)
        assert observed.targets is not None  # `targets_in` required them
        return _weighted_sum(self.position_nll(observed.head, observed.targets), observed.weights)

    def weighted_sampled_nll(
        self, outputs: Any, targets: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        """As `weighted_nll`, of drawn targets; the given ones say which positions count."""
        observed = self._observe(outputs, targets, weights)
        drawn = self.position_sample(observed.head.detach())
        return _weighted_sum(self.position_nll(observed.head, drawn), observed.weights)

    def weighted_exact_terms(
        self, outputs: Any, targets: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        """The exact terms `[K, n]`; the given targets say which positions count."""
        observed = self._observe(outputs, targets, weights)
        terms = self.position_terms(observed.head)
        if observed.weights is not None:
            terms = terms * match_dims(observed.weights, terms[0])
        if terms.dim() == 2:
            return terms
        return terms.flatten(2).transpose(1, 2).flatten(0, 1)

    def _mask_in(self, outputs: Any, rest: tuple[Any, ...]) -> Tensor | None:
        """The mask of the positions `[n, *positions]` in a batch; None if it has none."""
        name = type(self).__name__
        mask: Tensor | None = None
        for each in read_masks(rest[1:], lambda: [self.positions(self.head(outputs))], name):
            mask = restrict(mask, each)
        return mask

    def _observe(self, outputs: Any, targets: Tensor | None, weights: Tensor | None) -> _Observed:
        """Validate the values of a batch, and replace those that do not count by 0."""
        head = self.head(outputs)
        # A model on several devices need not end where it begins, which is where batches are.
        targets = None if targets is None else targets.to(head.device)
        weights = None if weights is None else weights.to(head.device)
        mask: Tensor | None = None
        faults: list[Fault] = []
        if weights is not None:
            faults.append(weights_fault(weights))
            mask = weights > 0
        if targets is not None:
            targets, mask, found = self.read_targets(head, targets, mask)
            faults.extend(fault.within(mask) for fault in found)
        conditions = [fault.where for fault in faults]
        answers = any_true(conditions if mask is None else [*conditions, ~mask])
        for fault, broken in zip(faults, answers, strict=False):
            if broken:
                raise InvalidBatch(f"{type(self).__name__}: {fault.text()}")
        if weights is not None:
            weights = None if weights.dtype == torch.bool else weights.to(head.dtype)
        if mask is not None and answers[-1]:
            # Replaced before anything is computed: 0 * NaN is not 0, and nor is its gradient.
            head = torch.where(match_dims(mask, head), head, 0)
            if targets is not None:
                targets = torch.where(match_dims(mask, targets), targets, 0)
            counted = mask.to(head.dtype)
            weights = counted if weights is None else counted * match_dims(weights, counted)
        return _Observed(head, targets, weights)


def _weighted_sum(nll: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted sum of `[n, *positions]` over positions, `[n]`."""
    if weights is not None:
        nll = nll * match_dims(weights, nll)
    return nll.flatten(1).sum(1) if nll.dim() > 1 else nll
