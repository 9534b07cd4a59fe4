"""Adds up the squared gradients of batches, each parameter by its fastest verified method."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from ewc._checks import listed_names
from ewc._options import Method
from ewc.data.batch import Batch
from ewc.errors import InvalidBatch
from ewc.fisher.batches import Bundle
from ewc.fisher.coordination import A_FEW, Coordination
from ewc.fisher.notes import is_users
from ewc.fisher.paths.branches import DivergentBranches
from ewc.fisher.paths.vectorised import Vectorised
from ewc.fisher.runner import Runner
from ewc.fisher.verification import OBJECTS, Recalled, confirmed
from ewc.model.finite import AFTER_DIVERGENCE, diverged


class Accumulator:
    """The sums of one collection.

    Args:
        runner: Runs the model.
        coordination: What one process, or several in lockstep, do differently.
        sums: For each parameter a sum of squares, zero at first.
        methods: The fast methods: those that `verify` has returned, or recalled ones; or why there
            are none.

    Attributes:
        sums: The sums of squares.
        samples: The number of samples that were added.
        reasons: Why the loop was run for a parameter, by name.
    """

    def __init__(
        self,
        runner: Runner,
        coordination: Coordination,
        sums: dict[str, Tensor],
        methods: Vectorised | Recalled | str,
    ) -> None:
        self.sums = sums
        self.samples = 0
        self.reasons: dict[str, str] = {}
        self._runner = runner
        self._coordination = coordination
        self._used: Mapping[str, Method] = {}
        self._use(methods)
        self._batches = self._single_runs = 0
        self._latest: int | None = None  # the last batch that was counted
        self._unchecked: list[tuple[Bundle, Tensor]] = []

    @property
    def paths(self) -> dict[str, Method]:
        """The method of each parameter: of several, the slowest."""
        paths: dict[str, Method] = {name: self._used.get(name, "unused") for name in self.sums}
        paths.update(dict.fromkeys(self.reasons, "loop"))
        return paths

    @property
    def is_slow(self) -> bool:
        """Whether the loop took more than a few runs for each batch, on average."""
        return self._single_runs > A_FEW * self._batches

    def vectorised(self) -> Vectorised | None:
        """The fast methods, if there are any now."""
        if isinstance(self._methods, Recalled):
            return self._methods.methods
        return None if isinstance(self._methods, str) else self._methods

    def add(self, bundle: Bundle) -> None:
        """Add the squares of the batches of a bundle."""
        try:
            self._add(bundle.join())
        except Exception as error:
            if not is_users(error):
                raise
            may_run = not self._coordination.is_lockstep
            for index, batch in bundle if len(bundle) > 1 else ():  # to find the batch
                with self._runner.explaining(f"batch {index}", batch):
                    self._add(batch)
            which = f"batch {bundle.indices[-1]}"
            if len(bundle) > 1:
                which = f"one of the batches {bundle.indices[0]} to {bundle.indices[-1]}"
            with self._runner.explaining(which, bundle.batches[-1], may_run=may_run):
                raise
        self.samples += bundle.size
        # In lockstep, a bundle is a part of a batch.
        self._batches += sum(index != self._latest for index in bundle.indices)
        self._latest = bundle.indices[-1]
        self._unchecked.append((bundle, self._coordination.are_finite(self.sums)))
        # On an accelerator, the verdict is read one bundle later. By then it is computed, and to
        # read it does not hold up the next bundle.
        self._refuse_non_finite(waiting=0 if self._runner.device.type == "cpu" else 1)

    def run_uncounted(self, batch: Batch) -> None:
        """Run a batch without counting its squares, because other processes still have samples."""
        self._add(batch, is_counted=False)

    def end(self) -> None:
        """Check that the squares of the last bundles are finite."""
        self._refuse_non_finite(waiting=0)

    def _use(self, methods: Vectorised | Recalled | str) -> None:
        """Use these methods from now on.

        The verification or the confirming run has shown whether the model draws random numbers.
        """
        self._methods = methods
        if not isinstance(methods, Recalled):
            self._runner.randomness.expect_as_seen()
        if isinstance(methods, Vectorised):
            self._used = methods.methods

    def _add(self, batch: Batch, *, is_counted: bool = True) -> None:
        with self._coordination.adding_to(self.sums, is_counted=is_counted) as own_sums:
            for chunk in self._coordination.chunks(batch, self.vectorised):
                self._add_chunk(chunk, own_sums)

    def _add_chunk(self, chunk: Batch, own_sums: Mapping[str, Tensor]) -> None:
        fallback = self._add_vectorised(chunk, own_sums)
        if fallback:
            self._single_runs += chunk.size
            for name in self._runner.loop(chunk, own_sums, fallback.keys()):
                self.reasons.setdefault(name, fallback[name])

    def _add_vectorised(self, chunk: Batch, own_sums: Mapping[str, Tensor]) -> dict[str, str]:
        """Add the squares of the parameters that do not fall back to the loop.

        Returns:
            Why each of the others falls back, by name.
        """
        if not chunk.vectorisable:
            return dict.fromkeys(self.sums, OBJECTS)
        vectorised = self.vectorised()
        if vectorised is None:
            return dict.fromkeys(self.sums, str(self._methods))
        recalled = self._methods if isinstance(self._methods, Recalled) else None
        record = partial(self._runner.record, vectorised, chunk, own_sums)
        if recalled is not None:
            recalled.begin()
        try:
            recorded = record()
        except InvalidBatch:
            raise
        except DivergentBranches as divergence:
            if recalled is not None:
                return self._verify_and_add(recalled, chunk, own_sums)
            groups = self._coordination.groups(divergence, chunk)
            for group in groups:
                self._add_chunk(chunk.pick(group), own_sums)
            return {} if groups else dict.fromkeys(self.sums, str(divergence))
        except Exception as error:  # perhaps from a branch that only these samples take
            if self._coordination.is_lockstep:
                raise
            reason = confirmed(error, record)
            if recalled is not None:
                return self._verify_and_add(recalled, chunk, own_sums)
            self._methods = reason
            return dict.fromkeys(self.sums, reason)
        if recalled is not None and not recalled.confirm():
            del recorded
            return self._verify_and_add(recalled, chunk, own_sums)
        self._runner.reverse(recorded)
        if recalled is not None:
            self._use(vectorised)
        return vectorised.fallback

    def _verify_and_add(
        self, recalled: Recalled, chunk: Batch, own_sums: Mapping[str, Tensor]
    ) -> dict[str, str]:
        """Verify the methods anew, and add the squares in parts that fit in memory with them."""
        self._use(recalled.verify())
        for part in self._coordination.chunks(chunk, self.vectorised):
            self._add_chunk(part, own_sums)
        return {}

    def _refuse_non_finite(self, waiting: int) -> None:
        """Refuse squares that are not finite, in all but the last `waiting` bundles.

        Raises:
            ValueError: There are some; the message names the batch and the parameters.
        """
        while len(self._unchecked) > waiting:
            bundle, verdict = self._unchecked.pop(0)
            finite = verdict.tolist()
            names = [name for name, good in zip(self.sums, finite, strict=True) if not good]
            if names:
                values = diverged(self._runner.model)
                cause = (
                    f"the model has values that are not finite, in {listed_names(values)}: "
                    f"{AFTER_DIVERGENCE}"
                    if values
                    else "look at the inputs, targets and loss of that batch; scale them, or use a "
                    "wider dtype."
                )
                raise ValueError(
                    "Squared gradients must be finite; found NaN, infinity or a square that "
                    f"overflows in batch {self._first_non_finite(bundle)} (counted from 0), in "
                    f"{listed_names(names)}. Fix: {cause}"
                )

    def _first_non_finite(self, bundle: Bundle) -> int:
        """The first batch after which the sums are not finite, found by adding to the sums anew."""
        if len(bundle) > 1:
            for each in self.sums.values():
                each.zero_()
            for index, batch in bundle:
                self._add(batch)
                if not self._coordination.are_finite(self.sums).all():
                    return index
        return bundle.indices[-1]
