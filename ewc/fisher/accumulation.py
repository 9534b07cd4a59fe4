"""One pass over the batches: from a model and its data to sums of squared gradients."""

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ewc._autocast import without_autocast
from ewc._options import FisherType, Method
from ewc.data.batch import Batch
from ewc.data.calling import Forward, apply
from ewc.errors import InvalidBatch
from ewc.fisher.bundle import Bundle
from ewc.fisher.mixing import Runs, refuse_mixing
from ewc.fisher.numerics import full_precision, without_cudnn
from ewc.fisher.paths.interception import Apart
from ewc.fisher.paths.loop import add_singly
from ewc.fisher.paths.vectorised import Recorded, Vectorised
from ewc.fisher.terms import Opaque, probe, terms
from ewc.fisher.verification import differing, largest
from ewc.likelihoods import Likelihood
from ewc.model.guard import Guard
from ewc.model.randomness import Randomness

A_FEW = 4

BUNDLED = 2
"""A bundle takes one in so many of the samples that may be run at once; more leave the cache."""

_OBJECTS = "a batch holds lists of objects, which vmap cannot take apart"
_OPAQUE = "targets are drawn, and the model returns no tensor to hold vmap against single samples"
_DIFFERS = "inside vmap its gradient is another than that of a single sample"


class Pass:
    """The state of one pass: what `collect` was given, and what it has found so far."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        sums: dict[str, Tensor],
        likelihood: Likelihood,
        forward: Forward | None,
        fisher_type: FisherType,
        guard: Guard,
        randomness: Randomness,
    ) -> None:
        self.sums = sums
        self.samples = 0
        self.place = 0
        self.reasons: dict[str, str] = {}
        self._model = model
        self._parameters = parameters
        self._likelihood = likelihood
        self._forward = forward
        self._fisher_type = fisher_type
        self._restore: Callable[[], None] = guard.restore
        self._early: frozenset[str] = frozenset()
        self._randomness = randomness
        self._device_types = {parameter.device.type for parameter in parameters.values()}
        self._device = next(iter(parameters.values())).device
        self._fast: Vectorised | None = None
        self._refusal = _OBJECTS
        self._batches = self._singly = 0
        self._unchecked: list[tuple[Bundle, Tensor]] = []
        self._truncated = False

    def over(self, batches: Iterable[Any], max_samples: int | None) -> bool:
        """Add up all batches; small ones together, if they can be read ahead.

        Returns:
            Whether `max_samples` ended the pass before the data did.
        """
        # Other iterables may run code between two batches that the model's outputs depend on.
        ahead = isinstance(batches, (Sequence, DataLoader))
        waiting = Bundle()
        for number, batch in enumerate(self._read(batches, max_samples)):
            if number == 0:
                self._try_out(batch.take(0, min(2, batch.size)))
            room = self._room(batch) if ahead else 0
            if waiting and not waiting.takes(batch, room):
                self._run(waiting)
                waiting = Bundle()
            if batch.size > room / 2:
                self._run(Bundle.of_one(self.place, batch))
            else:
                waiting.add(self.place, batch.copied())
        if waiting:
            self._run(waiting)
        self._refuse_non_finite(None)
        return self._truncated

    def _room(self, batch: Batch) -> int:
        """How many samples like those of this batch make a bundle; 0 if none is made."""
        fast = self._fast
        if fast is None or fast.left_out or not batch.vectorisable:
            return 0
        return fast.capacity(batch) // BUNDLED

    def _run(self, bundle: Bundle) -> None:
        """Add the squares of the batches of a bundle."""
        try:
            self._add(bundle.join())
        except InvalidBatch:
            for self.place, batch in bundle:  # to find out which it is
                self._add(batch)
            raise
        self.samples += bundle.size
        self._batches += len(bundle)
        self._refuse_non_finite(bundle)

    def _read(self, batches: Iterable[Any], max_samples: int | None) -> Iterator[Batch]:
        """The batches that hold samples, until there are `max_samples`."""
        left = max_samples
        self._truncated = left == 0
        if self._truncated:
            return
        for number, raw in enumerate(batches):
            self.place = number
            batch = Batch.read(
                raw,
                batch_dim=self._likelihood.batch_dim,
                device=self._device,
                targets_required=self._fisher_type == "empirical",
            )
            if left is not None:
                if batch.size > left:
                    batch, self._truncated = batch.take(0, left), True
                left -= batch.size
            if batch.size:
                self._restore()  # a loader may run the model too, in a mode of its own
                yield batch
            if left == 0:
                self._truncated = self._truncated or not _was_last(batches, number)
                return

    @property
    def paths(self) -> dict[str, Method]:
        """Which path computed each parameter."""
        paths: dict[str, Method] = dict.fromkeys(self.sums, "unused")
        if self._fast is not None:
            paths.update(dict.fromkeys(self._fast.by_rule, "rule"))
            paths.update(dict.fromkeys(self._fast.by_copy, "vmap"))
        paths.update(dict.fromkeys(self.reasons, "loop"))
        return paths

    @property
    def slow(self) -> bool:
        """Whether single samples took more than a few runs for each batch."""
        return self._singly > A_FEW * self._batches

    def _outputs(self, raw: Any) -> tuple[Any, tuple[Any, ...]]:
        return apply(self._model, raw, self._forward)

    def _terms(self, outputs: Any, rest: tuple[Any, ...], samples: int) -> Tensor:
        return terms(self._likelihood, self._fisher_type, outputs, rest, samples)

    def _probe(self, outputs: Any, rest: tuple[Any, ...], samples: int) -> Tensor:
        return probe(outputs)

    @property
    def _samples_dim(self) -> int | None:
        return self._likelihood.batch_dim if self._likelihood.takes_batches else None

    def _try_out(self, batch: Batch) -> None:
        """Hold the fast paths against the slow one, on one sample or two.

        What they cannot do, or would get wrong, goes one sample at a time for the whole pass.
        """
        try:
            self._compare(batch)
        finally:
            for each in self.sums.values():
                each.zero_()

    def _compare(self, batch: Batch) -> None:
        """Try the fast paths out; the sums, which are still zero, serve as memory for theirs."""
        expected = {name: torch.zeros_like(each) for name, each in self.sums.items()}
        # Drawn targets would be others in each run.
        drawn = self._fisher_type == "mc"
        compared = self._probe if drawn else self._terms
        runs = Runs(self._outputs)
        if batch.size == 2:
            with self._randomness.stream(), full_precision():
                runs(batch.raw)
            self._restore()
        try:
            with self._adding_to(expected) as totals, full_precision():
                self._add_singly(batch, totals, set(expected), runs, compared)
        except Opaque:
            self._refusal = _OPAQUE
            return
        if batch.size == 2:
            with self._randomness.stream():
                refuse_mixing(self._model, runs, batch, self._restore)
        if not batch.vectorisable:
            return
        dim = None if drawn else self._samples_dim
        fast = Vectorised(self._parameters, self._outputs, compared, dim)

        def run(target: Mapping[str, Tensor]) -> None:
            with self._adding_to(target) as totals:
                try:
                    self._reverse(self._record(fast, batch, totals))
                except Apart:
                    for n in range(batch.size):
                        self._reverse(self._record(fast, batch.take(n, n + 1), totals))

        try:
            run(self.sums)
        except InvalidBatch:
            raise
        except Exception as error:  # whatever vmap refuses; the slow path has just shown it does
            self._give_up(error, lambda: run(self.sums))
            return
        fast.left_out |= dict.fromkeys(self._differing(self.sums, expected), _DIFFERS)
        fast.terms, fast.samples_dim = self._terms, self._samples_dim
        self._fast = fast

    def _give_up(self, error: Exception, again: Callable[[], object]) -> None:
        """Leave the fast paths because of `error`, if it comes again.

        One that does not is no refusal of vmap's, but a fault of the user's model or likelihood.
        """
        self._fast = None
        errors = {_described(error): error}
        for _ in range(2):
            try:
                again()
            except InvalidBatch:
                raise
            except Exception as other:
                self._refusal = _described(other)
                if errors.pop(self._refusal, None) is not None:
                    break
                errors[self._refusal] = other
            else:
                break
        for fault in errors.values():
            raise fault

    def _add(self, batch: Batch) -> None:
        """Add the squares of all samples of the batch."""
        done = 0
        while done < batch.size:
            size = batch.size if self._fast is None else self._fast.limit(batch)
            chunk = batch.take(done, min(done + size, batch.size))
            done += chunk.size
            slow = dict.fromkeys(self.sums, self._refusal)
            if not chunk.vectorisable:
                slow = dict.fromkeys(self.sums, _OBJECTS)
            elif self._fast is not None:
                fast = self._fast
                try:
                    recorded = self._record(fast, chunk, self.sums)
                except InvalidBatch:
                    raise
                except Apart as apart:
                    if len(apart.groups) <= max(chunk.size / 2, A_FEW):
                        for group in apart.groups:
                            self._add(chunk.pick(group))
                        continue
                    # Nearly every sample goes a way of its own: nothing to do together.
                    slow = dict.fromkeys(self.sums, str(apart))
                except Exception as error:  # a branch that only these data take
                    self._give_up(error, partial(self._record, fast, chunk, self.sums))
                    slow = dict.fromkeys(self.sums, self._refusal)
                else:
                    self._reverse(recorded)
                    slow = fast.left_out
            if slow:
                self._singly += chunk.size
                for name in self._add_singly(
                    chunk, self.sums, set(slow), self._outputs, self._terms
                ):
                    self.reasons.setdefault(name, slow[name])

    def _record(self, fast: Vectorised, batch: Batch, totals: Mapping[str, Tensor]) -> Recorded:
        """Run forward on the fast paths, anew whenever a parameter has to change its path."""
        while True:
            try:
                with self._randomness.stream() as keep:
                    recorded = fast.forward(batch, totals)
                    if recorded is not None:
                        keep()
                        return recorded
            finally:
                self._restore()

    def _reverse(self, recorded: Recorded) -> None:
        with torch.no_grad(), without_autocast(self._device_types), full_precision():
            recorded.reverse()

    def _add_singly(
        self,
        batch: Batch,
        totals: Mapping[str, Tensor],
        names: set[str],
        outputs: Callable[[Any], tuple[Any, tuple[Any, ...]]],
        terms: Callable[[Any, tuple[Any, ...], int], Tensor],
    ) -> set[str]:
        parameters = {name: each for name, each in self._parameters.items() if name in names}

        def of_one(raw: Any) -> Tensor:
            return terms(*outputs(raw), 1).squeeze(1)

        with self._randomness.stream() as keep, without_cudnn():
            early = self._early & parameters.keys()
            used = add_singly(batch, parameters, totals, of_one, self._restore, early=early)
            keep()
            return used

    # What is otherwise where several processes run a sharded model together.

    def _adding_to(
        self, target: Mapping[str, Tensor]
    ) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Where squares are added while the model runs, to end up in `target`."""
        return nullcontext(target)

    def _finite(self) -> Tensor:
        """For each parameter, whether this process has found no square that is not finite."""
        # The largest entry, and not the sum, which may overflow where no entry does.
        largest = [
            (each.max() if each.numel() else each.sum()).to(self._device)
            for each in self.sums.values()
        ]
        return torch.stack(largest).isfinite()

    def _differing(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> set[str]:
        """The names whose sums differ by more than rounding explains."""
        return differing(found, expected, largest(expected))

    def _refuse_non_finite(self, bundle: Bundle | None) -> None:
        """Check the sums after a bundle; on other devices than a CPU one bundle later.

        By then the verdict is there, and reading it does not hold up the next one.
        """
        if bundle is not None:
            self._unchecked.append((bundle, self._finite()))
        late = 1 if bundle is not None and self._device.type != "cpu" else 0
        while len(self._unchecked) > late:
            checked, finite = self._unchecked.pop(0)
            names = [
                name for name, good in zip(self.sums, finite.tolist(), strict=True) if not good
            ]
            if names:
                raise ValueError(
                    "expected finite squared gradients; found NaN or infinity, or a square that "
                    f"overflows, in batch {self._culprit(checked)} (counted from 0), in "
                    f"{', '.join(map(repr, names))}. Look at the inputs, targets and loss of that "
                    "batch; scale them, or use a wider type"
                )

    def _culprit(self, bundle: Bundle) -> int:
        """The place of the batch after which the sums are not finite; the sums are lost."""
        if len(bundle) > 1:
            for each in self.sums.values():
                each.zero_()
            for place, batch in bundle:
                self._add(batch)
                if not self._finite().all():
                    return place
        return bundle.places[-1]


def _described(error: Exception) -> str:
    """An error in one line."""
    text = re.sub("0x[0-9a-f]+", "0x...", str(error))  # which differ from one time to the next
    text = textwrap.shorten(text, 200, placeholder=" ...")
    return f"vmap cannot do it ({type(error).__name__}: {text})"


def _was_last(batches: Iterable[Any], number: int) -> bool:
    """Whether batch `number` is known to be the last one."""
    try:
        return isinstance(batches, Sized) and number + 1 == len(batches)
    except TypeError:  # a DataLoader over an iterable has a `__len__` that raises
        return False
