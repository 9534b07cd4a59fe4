"""The Fisher information of a task: one pass over its batches, on one process or several."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ewc._options import FisherType, Method
from ewc.data.calling import Forward
from ewc.errors import InvalidBatch
from ewc.fisher.accumulation import Pass
from ewc.fisher.eager import without_compilation
from ewc.fisher.mixing import refuse_batch_statistics
from ewc.fisher.sharded.layers import Layers
from ewc.fisher.sharded.lockstep import InStep
from ewc.likelihoods import Likelihood
from ewc.model.guard import Guard
from ewc.model.randomness import Randomness
from ewc.processes.layout import has_sharded_parameters, is_sharded
from ewc.processes.ranks import SINGLE_PROCESS, Ranks

_PATHS = ("unused", "rule", "vmap", "loop")  # of several, the last is told


@dataclass(frozen=True)
class Squares:
    """What one pass over the data gives.

    Attributes:
        sums: For each parameter the sum over samples of its squared gradients, `[*shape]`, on its
            device, in at least float32; sharded as the parameter is.
        samples: How many samples were seen, over all processes.
        truncated: Whether `max_samples` ended the pass before the data did, on any process.
        paths: For each parameter which path computed it: `"rule"`, `"vmap"` (a copy per sample),
            `"loop"` (one sample at a time), or `"unused"`.
        reasons: For each of those on the path `"loop"`, why it is there.
        slow: Whether the model was run on single samples, on average, more than a few times for
            each batch.
    """

    sums: dict[str, Tensor]
    samples: int
    truncated: bool
    paths: dict[str, Method]
    reasons: dict[str, str]
    slow: bool


def collect(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    *,
    likelihood: Likelihood,
    forward: Forward | None,
    fisher_type: FisherType,
    max_samples: int | None,
    generator: torch.Generator | None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Squares:
    """Sum the squared gradients of every sample, each run through the model alone, in eval mode.

    The model is left as it was, on failure too; random states only after success.

    Args:
        model: The model, without wrappers.
        parameters: The parameters to collect, by name; each requires a gradient.
        batches: Any iterable of batches.
        likelihood: Gives each sample's negative log-likelihood.
        forward: `forward(model, batch) -> outputs`, or None to call the model on the inputs.
        fisher_type: `"empirical"`, `"exact"` or `"mc"`.
        max_samples: At most so many samples, or None for all.
        generator: Where `"mc"` takes its seed from; None for the global generator.
        ranks: The processes that share the data; all of them must call this.

    Raises:
        ValueError: If there are no samples, a batch is not valid, a module mixes samples, or a
            gradient is not finite.
    """
    layers: Layers | None = None
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        sums = {name: _zeros(each) for name, each in parameters.items()}
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_compilation())
        if has_sharded_parameters(model):
            layers = stack.enter_context(Layers(model, parameters, ranks))
            parameters = layers.parameters
        guard = stack.enter_context(Guard(model))
        refuse_batch_statistics(model)
        randomness = Randomness(parameter.device for parameter in parameters.values())
        if fisher_type == "mc":
            randomness.seed_from(generator, ranks.data_rank)
        arguments = model, parameters, sums, likelihood, forward, fisher_type, guard, randomness
        run = Pass(*arguments) if layers is None else InStep(layers, ranks, *arguments)
        quota = None if max_samples is None else ranks.quota(max_samples)
        try:
            truncated = run.over(batches, quota)
        except InvalidBatch as error:
            raise InvalidBatch(f"in batch {run.place} (counted from 0): {error}") from error
        return _together(run, truncated, ranks)


def _together(run: Pass, truncated: bool, ranks: Ranks) -> Squares:
    """What all processes have found."""
    ranks.barrier("the sums")
    samples = ranks.sum(run.samples)
    if samples == 0:
        raise ValueError(
            "expected at least one sample to estimate the Fisher information; the batches "
            "held none. A generator can be run through only once: pass a fresh one"
        )
    ranks.all_reduce(each for each in run.sums.values() if not is_sharded(each))
    found = ranks.all_gather((run.paths, run.reasons, truncated, run.slow))
    paths, reasons, cut, slow = zip(*found, strict=True)
    return Squares(
        run.sums,
        samples,
        any(cut),
        {name: max((own[name] for own in paths), key=_PATHS.index) for name in run.sums},
        _first_told(run.sums, reasons),
        any(slow),
    )


def _first_told(names: Iterable[str], reasons: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """For each parameter the reason of the first process that has one."""
    told: dict[str, str] = {}
    for name in names:
        for own in reasons:
            if name in own:
                told.setdefault(name, own[name])
    return told


def _zeros(parameter: nn.Parameter) -> Tensor:
    """A sum of squares for a parameter: real, and at least float32."""
    real = parameter.detach().real if parameter.is_complex() else parameter.detach()
    dtype = torch.promote_types(real.dtype, torch.float32)
    return torch.zeros_like(real, dtype=dtype, memory_format=torch.preserve_format)
