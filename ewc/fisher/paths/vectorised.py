"""All samples of a batch in one forward and one reverse pass, by rules and copies per sample."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ewc import _vmap
from ewc.data.batch import Batch
from ewc.fisher.gradients import Dense
from ewc.fisher.paths.graph import leaves_of
from ewc.fisher.paths.interception import Interception

COPIES_BYTES = 2**26
"""How much memory the written-out gradients of copied parameters may take at a time."""

KEPT_BYTES = {"cpu": 2**26}
"""How much memory the activations of a forward pass may take, by kind of device."""

KEPT_BYTES_ELSEWHERE = 2**31
"""The same on other kinds, which need more samples at a time to be busy."""

UNSEEN = "it is used out of sight, in an autograd.Function or a scripted module"
"""Why a parameter that the graph leads to, past all interception, is left out."""


@dataclass(frozen=True)
class Recorded:
    """A forward pass, ready for its reverse pass.

    Attributes:
        interception: What the pass recorded.
        terms: What is differentiated: K times the sum over the samples.
        leaves: What the terms are differentiated by, so that gradients pass all that is watched:
            the beginnings of the graph. Not only those that the interception has made: where
            others lie before (inputs that require gradients, parameters that are not protected,
            or go another way), it makes none.
        totals: For each parameter, where its squares are added.
    """

    interception: Interception
    terms: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    totals: Mapping[str, Tensor]

    def reverse(self) -> None:
        """Run the reverse pass, once for each of the K terms, and add the squares."""
        names = {id(copy): name for name, copy in self.interception.copies.items()}
        last = len(self.terms) - 1
        for k, term in enumerate(self.terms):
            self.interception.last = k == last
            found = torch.autograd.grad(term, self.leaves, retain_graph=k < last, allow_unused=True)
            self.interception.flush()
            for leaf, gradient in zip(self.leaves, found, strict=True):
                if gradient is not None and id(leaf) in names:
                    Dense(gradient).add_squares(self.totals[names[id(leaf)]])


class Vectorised:
    """Runs batches so that the squared gradients of their samples can be summed at once.

    Args:
        parameters: The protected parameters by name.
        outputs: `outputs(raw) -> (outputs, rest)`: runs the model.
        terms: `terms(outputs, rest, samples) -> [K, samples]`, differentiable.
        samples_dim: The dimension of the outputs along which `terms` takes those of a whole batch;
            None if it must see one sample at a time, inside `vmap`.

    Attributes:
        terms: The same.
        samples_dim: The same.
        by_rule: The names of the parameters that went by rule.
        by_copy: The names of those that went by a copy per sample.
        left_out: The names of those that are left to another path, and why.
        reads: Whether the model has read values out of a tensor, to branch on them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        outputs: Callable[[Any], tuple[Any, tuple[Any, ...]]],
        terms: Callable[[Any, tuple[Any, ...], int], Tensor],
        samples_dim: int | None,
    ) -> None:
        self.by_rule: set[str] = set()
        self.by_copy = {name for name, each in parameters.items() if each.is_complex()}
        self.left_out: dict[str, str] = {}
        self.reads = False
        self.terms = terms
        self.samples_dim = samples_dim
        self._expansion = 1.0
        self._parameters = dict(parameters)
        self._outputs = outputs

    def limit(self, batch: Batch) -> int:
        """How many samples of a batch go at once: in equal parts."""
        return math.ceil(batch.size / math.ceil(batch.size / self.capacity(batch)))

    def capacity(self, batch: Batch) -> int:
        """How many such samples go at once, so that memory stays within what is allowed.

        Activations are taken to be in proportion to what goes in, as they were the last time.
        """
        copied = (self._parameters[name] for name in self.by_copy - self.left_out.keys())
        size = sum(each.numel() * each.element_size() for each in copied)
        kept = self._expansion * batch.nbytes / batch.size
        device = next(iter(self._parameters.values())).device.type
        allowed = KEPT_BYTES.get(device, KEPT_BYTES_ELSEWHERE)
        return max(1, min(COPIES_BYTES // max(1, size), int(allowed / max(1.0, kept))))

    def forward(self, batch: Batch, totals: Mapping[str, Tensor]) -> Recorded | None:
        """Run the model on all samples.

        Returns:
            None if a parameter turned out to have no rule, or to be used out of sight. It is
            remembered, and the same call will go another way.
        """
        seen = {name: p for name, p in self._parameters.items() if name not in self.left_out}
        interception = Interception(seen, totals, self.by_copy, batch.size)

        dim = self.samples_dim

        def one(*tensors: Tensor) -> Tensor:
            interception.level = _vmap.level()
            try:
                with interception:
                    outputs, rest = self._outputs(batch.of_one(list(tensors)))
                    found: Tensor = outputs if dim is not None else self.terms(outputs, rest, 1)
                    return found
            finally:
                self.reads = self.reads or interception.reads

        with warnings.catch_warnings():
            # An operation that vmap does in a loop is no news to the user: the result is the same.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            found: Tensor = torch.func.vmap(one, in_dims=tuple(batch.dims), randomness="different")(
                *batch.tensors
            )
        # Every sample was a batch of one: `[N, ..., 1, ...]`.
        if dim is None:
            terms = found.squeeze(2).t()
        else:
            outputs = found.movedim(0, dim).flatten(dim, dim + 1)
            terms = self.terms(outputs, batch.rest, batch.size)
        copied = interception.without_rule
        leaves = tuple(leaves_of(terms))
        begin = {id(leaf) for leaf in leaves}
        # An interception keeps all that it sees out of the graph, so what the graph leads to it
        # did not see: arguments of a custom autograd.Function, or of a scripted module.
        unseen = {name for name, parameter in seen.items() if id(parameter) in begin}
        self.by_copy |= copied
        if copied:
            return None
        self.left_out |= dict.fromkeys(unseen, UNSEEN)
        if unseen:
            return None
        self.by_rule |= interception.by_rule
        self._expansion = interception.kept / max(1, batch.nbytes)
        return Recorded(interception, terms.sum(1).unbind(0), leaves, totals)
