"""Collects the diagonal Fisher information: one pass over the batches of a task."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ewc._options import FisherType, Method
from ewc.data.batch import Batch
from ewc.data.calling import Forward
from ewc.fisher.accumulation import Accumulator
from ewc.fisher.batches import Reading
from ewc.fisher.coordination import Coordination, Independent
from ewc.fisher.environment import undisturbed
from ewc.fisher.hiding import without_compilation
from ewc.fisher.mixing import refuse_batch_statistics
from ewc.fisher.numerics import full_precision
from ewc.fisher.paths.vectorised import Vectorised
from ewc.fisher.runner import Runner
from ewc.fisher.sharded.lockstep import LockStep
from ewc.fisher.sharded.model import ShardedModel
from ewc.fisher.verification import Recalled, check_independence, verify
from ewc.fisher.verified import LastVerification, Verified, basis, hooks
from ewc.likelihoods import Likelihood
from ewc.model.guard import Guard
from ewc.model.randomness import Randomness
from ewc.model.reachable import reachable
from ewc.processes.layout import has_sharded_parameters
from ewc.processes.ranks import SINGLE_PROCESS, Ranks

_PATHS = ("unused", "rule", "vmap", "loop")  # from fast to slow

_SEARCHED = 32
"""The number of samples among which two with different targets are searched for."""


@dataclass(frozen=True)
class Squares:
    """The result of one pass over the data.

    Attributes:
        sums: For each parameter the sum over samples of its squared gradients, `[*shape]`, on its
            device, in at least float32; sharded as the parameter is.
        samples: The number of samples, over all processes.
        truncated: Whether `max_samples` ended the pass before the data did, on any process.
        paths: For each parameter the method that computed it: `"rule"`, `"vmap"` (a
            copy per sample), `"loop"` (one sample at a time), or `"unused"`.
        reasons: Why a parameter fell back to the loop, by name.
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
    randomness: Randomness | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    last: LastVerification | None = None,
) -> Squares:
    """Sum the squared gradients of all samples, each run through the model alone, in eval mode.

    The model is restored, on failure too. Its draws leave the global random states as they were;
    the seed of `"mc"` is drawn from `generator`.

    Args:
        model: The model, without wrappers.
        parameters: The parameters to collect, by name; each requires a gradient.
        batches: Any iterable of batches.
        likelihood: Gives each sample's negative log-likelihood.
        forward: `forward(model, batch) -> outputs`, or None to call the model on the inputs.
        fisher_type: `"empirical"`, `"exact"` or `"mc"`.
        max_samples: The largest number of samples, or None for all.
        generator: Gives the seed of `"mc"`; None for the global generator.
        randomness: What the model draws from; None starts from the present random states.
        ranks: The processes that share the data; all of them must call this.
        last: What the last collection has verified; None remembers nothing. Updated.

    Raises:
        ValueError: There are no samples, a batch is not valid, a module mixes samples, or a
            gradient is not finite.
    """
    if randomness is None:
        randomness = Randomness(parameter.device for parameter in parameters.values())
    refuse_batch_statistics(model)
    sharded = ShardedModel(model, parameters, ranks) if has_sharded_parameters(model) else None
    found = reachable(model, forward, likelihood, *hooks(model.modules()))
    guard = Guard(model, found.modules)
    last = last or LastVerification()
    rests_on = basis(model, parameters, found, fisher_type)

    def restore() -> None:
        guard.restore()
        if sharded is not None:
            sharded.reset()

    def run() -> Squares:
        sums = {name: _zeros(each) for name, each in parameters.items()}
        with ExitStack() as stack:
            if sharded is not None:
                sharded.prepare()
                stack.enter_context(sharded.saved_tensors_hooks())
            guard.prepare()
            if fisher_type == "mc":
                randomness.seed_from(generator, ranks.data_rank)
            runner = Runner(
                model,
                parameters if sharded is None else sharded.parameters,
                likelihood,
                forward,
                fisher_type,
                randomness,
                restore,
                frozenset() if sharded is None else sharded.placeholder_names,
                found.modules,
            )
            coordination: Coordination = (
                Independent(ranks) if sharded is None else LockStep(sharded, ranks, runner)
            )
            quota = None if max_samples is None else ranks.quota(max_samples)
            reading = Reading(batches, quota, runner.read, restore)
            with torch.enable_grad(), without_compilation:
                added = _run(runner, coordination, reading, sums, guard, rests_on, last)
            return _combined(ranks, added, truncated=reading.truncated)

    leave = [guard.leave] if sharded is None else [guard.leave, sharded.reset]
    return undisturbed(run, always=leave)


def _run(
    runner: Runner,
    coordination: Coordination,
    reading: Reading,
    sums: dict[str, Tensor],
    guard: Guard,
    rests_on: list[Hashable],
    last: LastVerification,
) -> Accumulator:
    """Verify the methods on the first samples, unless that was done before; run all batches."""
    batches = iter(reading)
    first = next(batches, None)
    own = None if first is None else _two_samples(first)
    verified_on = coordination.verification_batch(own)
    if verified_on is None:
        return Accumulator(runner, coordination, sums, "there are no samples")
    which, may_run = f"batch {reading.index}", not coordination.is_lockstep
    with runner.explaining(which, first or verified_on, may_run=may_run):
        if not coordination.is_lockstep:
            one = verified_on.take(0, 1)
            with runner.randomness.stream(), full_precision():
                guard.empty_caches(lambda: runner.outputs(one.raw))
        methods = _methods(runner, coordination, verified_on, sums, rests_on, last)
    coordination.end_verification()
    accumulator = Accumulator(runner, coordination, sums, methods)
    remaining = batches if first is None else chain([first], batches)
    # A first batch of one sample does not show whether the model mixes samples. Bundled batches of
    # one sample need no check: every method runs the model on one sample at a time.
    is_independence_known = verified_on.size > 1 or coordination.is_lockstep
    for bundle in coordination.bundles(reading, remaining, accumulator.vectorised):
        if bundle is None:
            accumulator.run_uncounted(verified_on.take(0, 1))
            continue
        several = next(((index, each) for index, each in bundle if each.size > 1), None)
        if several is not None and not is_independence_known:
            index, batch = several
            with runner.explaining(f"batch {index}", batch):
                check_independence(runner, _two_samples(batch))
            is_independence_known = True
        accumulator.add(bundle)
    accumulator.end()
    return accumulator


def _methods(
    runner: Runner,
    coordination: Coordination,
    batch: Batch,
    sums: dict[str, Tensor],
    rests_on: list[Hashable],
    last: LastVerification,
) -> Vectorised | Recalled | str:
    """The fast methods, or why there are none; verified, unless the last verification may hold.

    Whether samples are independent depends on values too, and is found out every time.
    """

    def verify_anew() -> Vectorised | str:
        last.verified = None
        methods, may_be_recalled = verify(runner, coordination, batch, sums)
        if may_be_recalled and isinstance(methods, Vectorised):
            last.verified = Verified.of(rests_on, batch, methods, runner.fisher_type)
        return methods

    verified = last.on(rests_on, batch)
    if verified is None:
        return verify_anew()
    if batch.size == 2:
        check_independence(runner, batch)
    return Recalled(runner, verified, verify_anew)


def _two_samples(batch: Batch) -> Batch:
    """The first two samples; with equal targets, the first one and another with other targets.

    A likelihood that compares samples, such as by the classes of a batch, does so only then.
    """
    first = _targets(batch.take(0, 1))
    for n in range(1, min(batch.size, _SEARCHED) if first else 0):
        if not all(map(torch.equal, first, _targets(batch.take(n, n + 1)))):
            return batch.pick([0, n])
    return batch.take(0, min(2, batch.size))


def _targets(batch: Batch) -> list[Tensor]:
    """The tensors in what follows the inputs, as far as the likelihood takes it for targets."""
    return [leaf for leaf in tree_leaves(batch.rest[:1]) if isinstance(leaf, Tensor)]


def _combined(ranks: Ranks, found: Accumulator, *, truncated: bool) -> Squares:
    """Add up the sums of all processes, and gather what each reports."""
    sums = found.sums
    with ranks.exchange("the sums"):
        samples = ranks.sum(found.samples)
        ranks.all_reduce(sums.values())
    if samples == 0:
        raise ValueError(
            "The batches must hold at least one sample to estimate the Fisher information; found "
            "none. Fix: a generator can be run through only once, so pass a fresh one."
        )
    own = (found.paths, found.reasons, truncated, found.is_slow)
    paths, reasons, cut, slow = zip(*ranks.gather("the methods", own), strict=True)
    return Squares(
        sums,
        samples,
        any(cut),
        {name: max((own[name] for own in paths), key=_PATHS.index) for name in sums},
        _first_reasons(sums, reasons),
        any(slow),
    )


def _first_reasons(names: Iterable[str], reasons: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """For each parameter the reason of the first process that has one."""
    found = {name: [own[name] for own in reasons if name in own] for name in names}
    return {name: each[0] for name, each in found.items() if each}


def _zeros(parameter: nn.Parameter) -> Tensor:
    """A sum of squares for a parameter: real, and at least float32."""
    real = parameter.detach().real if parameter.is_complex() else parameter.detach()
    dtype = torch.promote_types(real.dtype, torch.float32)
    return torch.zeros_like(real, dtype=dtype, memory_format=torch.preserve_format)
