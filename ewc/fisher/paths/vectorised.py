"""All samples of a batch in one forward and one reverse pass, by rules and per-sample copies."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ewc._options import Method
from ewc._restoring import restoring
from ewc.data.batch import Batch
from ewc.fisher.hiding import without_vmap_warnings
from ewc.fisher.paths.assembly import Assembly
from ewc.fisher.paths.graph import correct_batch_norms, leaves_among, nodes
from ewc.fisher.paths.meeting import PerSampleMode
from ewc.fisher.paths.structure import Structures

WRITTEN_BYTES = 2**26
"""How much memory the per-sample gradients that are written out may take at a time."""

KEPT_BYTES = {"cpu": 2**26}
"""How much memory the activations of a forward pass may take, by type of device."""

KEPT_BYTES_ELSEWHERE = 2**31
"""The same on other types of device, which need more samples at a time to be busy."""

UNSEEN = "its use is not visible, as in a scripted module"
"""Why a parameter that was used where no meeting was seen falls back to the loop."""

Outputs = Callable[[Any], tuple[Any, tuple[Any, ...]]]
"""`outputs(raw) -> (outputs, rest)`: runs the model on a raw batch."""

Terms = Callable[[Any, tuple[Any, ...], int], Tensor]
"""`terms(outputs, rest, samples) -> [K, samples]`: what is differentiated."""


@dataclass(frozen=True)
class Needs:
    """The memory that a forward pass has taken.

    Attributes:
        expansion: Bytes of activations for each byte of inputs.
        written_bytes: Bytes of the per-sample gradients that are written out, for one sample.
    """

    expansion: float = 1.0
    written_bytes: int = 0


@dataclass(frozen=True)
class Recorded:
    """A forward pass, ready for its reverse pass.

    Attributes:
        assembly: Receives the gradients.
        terms: K terms, each summed over the samples.
        leaves: The leaves of their graph. To differentiate by these runs every hook that takes a
            gradient.
    """

    assembly: Assembly
    terms: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]

    def reverse(self) -> None:
        """Run the reverse pass, once for each of the K terms, and add the squares."""
        last = len(self.terms) - 1
        for k, term in enumerate(self.terms):
            self.assembly.is_last = k == last
            torch.autograd.grad(term, self.leaves, retain_graph=k < last, allow_unused=True)
            self.assembly.end_reverse()
        self.assembly.end()


class Vectorised:
    """Runs batches so that the squared gradients of their samples can be summed at once.

    Args:
        parameters: The protected parameters by name.
        outputs: Runs the model.
        terms: What is differentiated.
        samples_dim: The dimension of the outputs along which `terms` takes those of a whole batch;
            None if it must see one sample at a time, inside `vmap`.
        structures: How effective weights depend on the parameters.
        needs: What an earlier forward pass of the same model has taken.

    Attributes:
        terms: What is differentiated; another function while the methods are verified.
        samples_dim: As above.
        methods: `"rule"` or `"vmap"`, by the name of each parameter that was used.
        fallback: Why a parameter falls back to the loop, by name.
        reads: Whether the model, or `terms`, has read values out of a tensor, to branch on them.
        model_reads: Whether the model has.
        calls_of_model: The functions of PyTorch that the model called in the last forward pass.
        calls_of_terms: Those that `terms` called inside `vmap`.
        needs: The memory that this pass has taken.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        outputs: Outputs,
        terms: Terms,
        samples_dim: int | None,
        structures: Structures,
        needs: Needs = Needs(),
    ) -> None:
        self.terms = terms
        self.samples_dim = samples_dim
        self.methods: dict[str, Method] = {}
        self.fallback: dict[str, str] = {}
        self.reads = self.model_reads = False
        self.calls_of_model: list[Callable[..., Any]] = []
        self.calls_of_terms: list[Callable[..., Any]] = []
        self.needs = needs
        self._parameters = dict(parameters)
        self._outputs = outputs
        self._structures = structures

    def capacity(self, batch: Batch) -> int:
        """How many samples like those of a batch fit in the memory budget at once.

        Activations are estimated to be in proportion to the inputs, as they were the last time.
        """
        device = next(iter(self._parameters.values())).device.type
        budget = KEPT_BYTES.get(device, KEPT_BYTES_ELSEWHERE)
        kept = self.needs.expansion * batch.nbytes / batch.size
        written = WRITTEN_BYTES // max(1, self.needs.written_bytes)
        return max(1, min(written, int(budget / max(1.0, kept))))

    def chunk_size(self, batch: Batch) -> int:
        """How many samples of a batch are run at once, so that the chunks are equal in size."""
        return math.ceil(batch.size / math.ceil(batch.size / self.capacity(batch)))

    def forward(self, batch: Batch, sums: Mapping[str, Tensor]) -> Recorded:
        """Run the model on all samples.

        Args:
            batch: The samples; it must be vectorisable.
            sums: For each parameter, where the reverse pass adds its squares.
        """
        protected = {name: p for name, p in self._parameters.items() if name not in self.fallback}
        assembly = Assembly(sums, self._structures)
        mode = PerSampleMode(protected, batch.size, assembly)
        terms = self._run(batch, mode)
        graph = list(nodes(terms.grad_fn))
        correct_batch_norms(graph)
        found = tuple(leaves_among(graph))
        # Rules and copies detach the weight. So a parameter that the graph still leads to was used
        # where no call is seen, as in a scripted module.
        ends = set(map(id, found))
        unseen = {name for name, parameter in protected.items() if id(parameter) in ends}
        self.fallback |= dict.fromkeys(unseen, UNSEEN)
        weights = mode.weights.used(without=unseen)
        for weight in weights:
            copied = mode.is_copied(weight, ends)
            for name in weight.parameters:
                if copied or name not in self.methods:
                    self.methods[name] = "vmap" if copied else "rule"
        assembly.begin(weights, is_hooked=mode.is_hooked)
        written_bytes = mode.copied_bytes
        if self._structures.in_lockstep:
            written_bytes += assembly.joint_bytes
        self.needs = Needs(mode.kept_bytes / max(1, batch.nbytes), written_bytes)
        return Recorded(assembly, terms.sum(1).unbind(0), found)

    def _run(self, batch: Batch, mode: PerSampleMode) -> Tensor:
        """The terms of all samples, `[K, N]`."""
        dim = self.samples_dim

        def run_one(*tensors: Tensor) -> Tensor:
            try:
                with mode:
                    outputs, rest = self._outputs(batch.of_one(list(tensors)))
                n_calls = len(mode.seen)
                self.model_reads = self.model_reads or mode.calls.read
                found: Tensor = mode.calls.current(outputs)
                if dim is None:
                    with mode:
                        found = self.terms(found, rest, 1)
                self.calls_of_model = mode.seen[:n_calls]
                self.calls_of_terms = mode.seen[n_calls:]
                return found
            finally:
                self.reads = self.reads or mode.calls.read

        run = torch.func.vmap(run_one, in_dims=tuple(batch.dims), randomness="different")
        with without_vmap_warnings:
            # An error of the clean-up after Ctrl-C must not look like something vmap cannot do.
            found: Tensor = restoring(lambda: run(*batch.tensors))
        # Every sample was a batch of one: `[N, ..., 1, ...]`.
        if dim is None:
            return found.squeeze(2).t()
        outputs = found.movedim(0, dim).flatten(dim, dim + 1)
        return self.terms(outputs, batch.rest, batch.size)
