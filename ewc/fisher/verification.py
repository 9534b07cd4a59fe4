"""Verifies the fast methods against the loop, on two samples of the first batch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ewc._refusals import described, pattern
from ewc.data.batch import Batch
from ewc.data.objects import ObjectsRead
from ewc.errors import InvalidBatch
from ewc.fisher.comparison import largest
from ewc.fisher.coordination import Coordination
from ewc.fisher.independence import refuse_comparing
from ewc.fisher.mixing import Runs, refuse_mixing
from ewc.fisher.numerics import full_precision, is_half_precision
from ewc.fisher.paths.branches import DivergentBranches
from ewc.fisher.paths.structure import Structures
from ewc.fisher.paths.vectorised import Terms, Vectorised
from ewc.fisher.runner import Runner
from ewc.fisher.terms import NoTensorOutputs, surrogate_terms
from ewc.fisher.verified import Verified
from ewc.model.randomness import Others, States, are_same, others

OBJECTS = "a batch holds lists of objects only, which vmap cannot split"
_NO_TENSOR = "targets are drawn, and the model returns no tensor to verify vmap on"
_DIFFERS = "its gradient under vmap differs from that of a single sample"
_DRAWS = "the model or the likelihood draws random numbers, so that no two runs can be compared"


def verify(
    runner: Runner, coordination: Coordination, batch: Batch, sums: Mapping[str, Tensor]
) -> tuple[Vectorised | str, bool]:
    """Run one or two samples by the loop and by the fast methods, and compare.

    A parameter whose sums differ falls back to the loop for the whole pass.

    Args:
        runner: Runs the model.
        coordination: What one process, or several in lockstep, do differently.
        batch: One sample or two.
        sums: Zeros; used as memory here, and set to zero again.

    Returns:
        The fast methods, or why all parameters fall back to the loop; and whether the methods may
        be used again while nothing changes: two independent samples, without random numbers and
        values read by the model, had gradients in every parameter, all of them right.

    Raises:
        ValueError: A module mixes the samples of a batch.
    """
    try:
        return _verify(runner, coordination, batch, sums)
    finally:
        for each in sums.values():
            each.zero_()


class Recalled:
    """Fast methods that an earlier collection has verified; the first run must confirm them.

    Args:
        runner: Runs the model.
        verified: What the earlier collection has verified.
        verify: Verifies methods anew, as the function `verify` does.

    Attributes:
        methods: The fast methods.
        verify: As above.
    """

    def __init__(
        self, runner: Runner, verified: Verified, verify: Callable[[], Vectorised | str]
    ) -> None:
        self.verify = verify
        self._runner = runner
        self._verified = verified
        self._start = self._after_model = self._states()
        self._is_confirmed = False
        self.methods = Vectorised(
            runner.parameters,
            self._outputs,
            runner.terms,
            runner.samples_dim,
            Structures(in_lockstep=False),
            verified.needs,
        )

    def begin(self) -> None:
        """Begin a run of the methods."""
        self._start = self._states()

    def confirm(self) -> bool:
        """Say whether the run made the verified calls and drew no random numbers.

        If not, set back the model and the random stream, as if there had been no run.
        """
        runner = self._runner
        # Drawn targets come from the same stream: then only what the model has drawn counts.
        end = self._after_model if runner.fisher_type == "mc" else self._states()
        is_shown = self._verified.is_shown_by(self.methods, runner.fisher_type)
        self._is_confirmed = is_shown and are_same(self._start, end)
        if not self._is_confirmed:
            runner.randomness.position = self._start[0]
            runner.restore()
        return self._is_confirmed

    def _outputs(self, raw: Any) -> tuple[Any, tuple[Any, ...]]:
        found = self._runner.outputs(raw)
        if not self._is_confirmed:
            self._after_model = self._runner.randomness.within_stream(), others()
        return found

    def _states(self) -> tuple[States, Others]:
        return self._runner.randomness.position, others()


def _verify(
    runner: Runner, coordination: Coordination, batch: Batch, sums: Mapping[str, Tensor]
) -> tuple[Vectorised | str, bool]:
    expected = {name: torch.zeros_like(each) for name, each in sums.items()}
    terms = _comparable_terms(runner)
    runs = Runs(runner.outputs)
    if batch.size == 2:
        with runner.randomness.stream(), full_precision():
            runs(batch.raw, 2)
        runner.restore()
    before = runner.randomness.position, others()
    try:
        with coordination.adding_to(expected) as own_sums, full_precision():
            runner.loop(batch, own_sums, set(expected), outputs=runs, terms=terms)
    except NoTensorOutputs:
        return _NO_TENSOR, False
    after = runner.randomness.position, others()
    reason = _DIFFERS if are_same(before, after) else _DRAWS
    if batch.size == 2:
        _refuse_dependent(runner, runs, batch)
        runs.outputs.clear()  # the graphs of the outputs take memory
    if not batch.vectorisable:
        return OBJECTS, False
    is_pair = batch.size == 2
    if batch.size == 1 and not coordination.is_lockstep:
        # Twice: what vmap draws differs between samples. In lockstep, sums are of all processes.
        batch = batch.pick([0, 0])
        for each in expected.values():
            each.mul_(2)
    vectorised = _comparable(runner, Structures(in_lockstep=coordination.is_lockstep))

    def run() -> None:
        # In the precision of the loop, so that rounding makes no difference between methods.
        with full_precision(), coordination.adding_to(sums) as own_sums:
            try:
                runner.reverse(runner.record(vectorised, batch, own_sums))
            except DivergentBranches:
                for n in range(batch.size):
                    runner.reverse(runner.record(vectorised, batch.take(n, n + 1), own_sums))

    try:
        run()
    except InvalidBatch:
        raise
    except Exception as error:  # what vmap refuses; the loop has just run the same samples
        coordination.before_retry(error)
        return confirmed(error, run), False
    is_half = is_half_precision(runner.model)
    for name in coordination.differing(sums, expected, is_half=is_half):
        vectorised.fallback.setdefault(name, reason)
    is_sure = reason == _DIFFERS and not vectorised.reads and not vectorised.fallback
    may_be_recalled = is_pair and is_sure and not coordination.is_lockstep
    if may_be_recalled:
        may_be_recalled = all(largest({name: expected[name] for name in vectorised.methods}))
    return _counting(runner, vectorised), may_be_recalled


def _comparable_terms(runner: Runner) -> Terms:
    """What is differentiated while methods are compared.

    Drawn targets differ from run to run: a function of the outputs takes their place.
    """
    return surrogate_terms if runner.fisher_type == "mc" else runner.terms


def _comparable(runner: Runner, structures: Structures) -> Vectorised:
    """The fast methods, for terms that can be compared."""
    dim = None if runner.fisher_type == "mc" else runner.samples_dim
    terms = _comparable_terms(runner)
    return Vectorised(runner.parameters, runner.outputs, terms, dim, structures)


def _counting(runner: Runner, vectorised: Vectorised) -> Vectorised:
    """The fast methods, for the samples that count."""
    vectorised.terms, vectorised.samples_dim = runner.terms, runner.samples_dim
    return vectorised


def check_independence(runner: Runner, batch: Batch) -> None:
    """Refuse a model or a likelihood for which the two samples of a batch are not independent.

    Raises:
        ValueError: A module mixes them, or the likelihood compares them.
    """
    runs = Runs(runner.outputs)
    for part in (batch, batch.take(0, 1), batch.take(1, 2)):
        runner.repeatably(partial(runs, part.raw, part.size))
    _refuse_dependent(runner, runs, batch)


def _refuse_dependent(runner: Runner, runs: Runs, batch: Batch) -> None:
    both, first, _ = runs.outputs
    refuse_mixing(runner, runs, batch)
    refuse_comparing(runner, batch, both, first)


def confirmed(error: Exception, again: Callable[[], object]) -> str:
    """The reason to fall back to the loop, if an error is raised again in a second try.

    An error that is not raised again is a fault of the user's model or likelihood, not something
    that vmap cannot do.

    Args:
        error: The error.
        again: Repeats what has failed.

    Raises:
        Exception: `error`, or another one that was not raised again.
    """
    if isinstance(error, ObjectsRead):
        return str(error)
    reason = described(error)
    faults = {pattern(reason): error}  # those that were not raised again
    for _ in range(2):
        try:
            again()
        except InvalidBatch:
            raise
        except Exception as other:
            reason = described(other)
            if faults.pop(pattern(reason), None) is not None:
                break
            faults[pattern(reason)] = other
        else:
            break
    for fault in faults.values():
        raise fault
    return reason
