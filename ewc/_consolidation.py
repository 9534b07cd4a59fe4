"""The parts of a consolidation, in the order of use.

Arguments are checked, a `Task` is made of them, it gives an `Estimate` of its Fisher, and that is
merged into the state. `EWC.consolidate` calls them in turn.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ewc._checks import as_float, listed_names, positive, positive_int
from ewc._options import FisherType, Reduction
from ewc._restoring import Restore
from ewc._scalars import largest_entry
from ewc._settings import Settings
from ewc._strength import Strength
from ewc._summary import Summary, check_finite_curvature, measure
from ewc.data.calling import Forward, check_forward
from ewc.errors import SlowPathWarning, ZeroFisherWarning, warn
from ewc.fisher import Squares, collect
from ewc.fisher.fixes import fix
from ewc.fisher.verified import LastVerification
from ewc.likelihoods import Likelihood
from ewc.likelihoods.likelihood import check_likelihood
from ewc.model.randomness import Randomness
from ewc.processes.agreement import agree
from ewc.processes.layout import local
from ewc.processes.ranks import Ranks
from ewc.quadratic.binding import Binding
from ewc.quadratic.merging import Merging
from ewc.quadratic.state import State, check_finite, refuse_non_finite
from ewc.quadratic.values import plain_tensor


@dataclass(frozen=True)
class Task:
    """The data of one task, and the options that hold for it alone.

    Attributes:
        batches: The batches.
        likelihood: The likelihood, which supports the Fisher type.
        forward: `forward(model, batch) -> outputs`, or None.
        dataset_size: The number of samples of the task, or None.
        weight: What its Fisher is multiplied by.
        generator: Source of the draws of `fisher_type="mc"`, or None for the global one.
    """

    batches: Iterable[Any]
    likelihood: Likelihood
    forward: Forward | None
    dataset_size: int | None
    weight: float
    generator: torch.Generator | None

    @classmethod
    def checked(
        cls,
        batches: Iterable[Any],
        likelihood: Likelihood,
        forward: Forward | None,
        dataset_size: int | None,
        weight: float,
        generator: torch.Generator | None,
        *,
        fisher_type: FisherType,
    ) -> "Task":
        """A task, if the arguments of `consolidate` are valid.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: An argument is out of range, or the likelihood does not support
                `fisher_type`.
        """
        if not isinstance(batches, Iterable):
            raise TypeError(
                "batches must be an iterable of batches, such as a DataLoader; found "
                f"{type(batches).__name__}."
            )
        check_likelihood(likelihood, fisher_type)
        check_forward(forward)
        if dataset_size is not None:
            dataset_size = positive_int("dataset_size", dataset_size)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator; found {type(generator).__name__}."
            )
        weight = positive("weight", weight)
        return cls(batches, likelihood, forward, dataset_size, weight, generator)

    def estimate(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        settings: Settings,
        ranks: Ranks,
        undo: list[Restore],
        last: LastVerification,
    ) -> "Estimate":
        """Estimate the diagonal Fisher in one pass over the batches.

        Args:
            model: The unwrapped model.
            parameters: The parameters to collect.
            settings: The options of this and all other tasks.
            ranks: The processes.
            undo: What takes back all draws is appended, for a failure, also a later one.
            last: What the last consolidation has verified; updated.

        Raises:
            ValueError: Parameters are not finite, the data is invalid, the number of samples is
                needed and not known, or every entry of the Fisher is zero.
        """
        with torch.no_grad():
            refuse_non_finite(parameters)
        randomness = Randomness((each.device for each in parameters.values()), self.generator)
        undo.append(randomness.restore)
        squares = collect(
            model,
            parameters,
            self.batches,
            likelihood=self.likelihood,
            forward=self.forward,
            fisher_type=settings.fisher_type,
            max_samples=settings.max_samples,
            generator=self.generator,
            randomness=randomness,
            ranks=ranks,
            last=last,
        )
        with torch.no_grad():
            size = 1 if settings.reduction == "mean" else self._n_samples(squares, ranks)
            divisor = squares.samples / (as_float(size) * self.weight)
            fisher = {
                name: plain_tensor(each.div_(divisor)).contiguous()
                for name, each in squares.sums.items()
            }
            zero = _zero_names(fisher, ranks)
            return Estimate(fisher, zero, squares, settings.reduction, self.weight)

    def _n_samples(self, squares: Squares, ranks: Ranks) -> int:
        """The number of samples of the task, of which a pass may have seen only some."""
        if self.dataset_size is not None:
            return self.dataset_size
        if not squares.truncated:
            return squares.samples
        try:
            dataset: Any = self.batches.dataset  # type: ignore[attr-defined]
            size = positive_int("len(batches.dataset)", len(dataset))
        except (AttributeError, TypeError):
            raise ValueError(
                'The number of samples must be known for reduction="sum"; found that max_samples '
                "has ended the pass early, and that batches.dataset has no length. Fix: pass "
                "dataset_size."
            ) from None
        agree(ranks, {"len(batches.dataset); pass dataset_size": size})
        return size


@dataclass(frozen=True)
class Estimate:
    """The Fisher estimate of one task.

    Attributes:
        fisher: The diagonal Fisher by name, of the parameters' shapes, in at least float32.
        zero: The names of the parameters whose Fisher is zero in every entry, on every process.
        squares: How the engine computed it.
        reduction: Whether it is the mean or the sum over samples.
        weight: What it was multiplied by.
    """

    fisher: dict[str, Tensor]
    zero: list[str]
    squares: Squares
    reduction: Reduction
    weight: float

    def merged_into(
        self,
        state: State,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        merging: Merging,
        strength: Strength,
        ranks: Ranks,
    ) -> tuple[Binding, Summary]:
        """The state after this task, bound to the model, and the summary of the consolidation.

        Args:
            state: The state before.
            model: The unwrapped model.
            parameters: The parameters that were collected; their values are the anchor.
            merging: How tasks are merged.
            strength: lambda.
            ranks: The processes.

        Raises:
            ValueError: No finite penalty would follow.
        """
        with torch.no_grad():
            with ranks.exchange("the state of earlier tasks"):  # it may have another layout
                quadratics = merging.next_quadratics(
                    model, state.quadratics, parameters, self.fisher
                )
            check_finite(quadratics, self.reduction)
            after = State(
                quadratics,
                state.n_tasks + 1,
                state.warned.union(self.zero),
                state.warned_slow or self.squares.slow,
                state.warned_replaced,
            )
            with ranks.exchange("the curvature"):
                binding = Binding(model, after, merging.precision)
                curvature = measure(binding.precisions)
            check_finite_curvature(curvature)
            summary = Summary(
                n_tasks=after.n_tasks,
                samples=self.squares.samples,
                parameters=curvature,
                paths=dict(self.squares.paths),
                reasons=dict(self.squares.reasons),
                weight=self.weight,
                strength=strength.in_use(curvature.values()),
                automatic=strength.is_automatic,
            )
        return binding, summary

    def warn(self, state: State) -> None:
        """Issue the warnings that `state` has not recorded yet, for the caller of `consolidate`.

        Warns:
            ZeroFisherWarning: Some parameters in `zero`, which it names, have entries and have not
                been named before.
            SlowPathWarning: More than a few samples of each batch were run one at a time.
        """
        zero = [n for n in self.zero if n not in state.warned and self.fisher[n].numel()]
        if zero:
            warn(self._zero_message(zero), ZeroFisherWarning)
        if self.squares.slow and not state.warned_slow:
            warn(self._slow_message(), SlowPathWarning)

    def _zero_message(self, names: list[str]) -> str:
        unused = [name for name in names if self.squares.paths[name] == "unused"]
        cancelled = [name for name in names if name not in unused]
        found = []
        if unused:
            it, are_they = ("it", "is it") if len(unused) == 1 else ("them", "are they")
            reason = f"no gradient reached {it} ({are_they} used, and not detached?)"
            found.append(f"{listed_names(unused)} is zero in every entry: {reason}.")
        if cancelled:
            it = "it" if len(cancelled) == 1 else "them"
            reason = f"every gradient that reached {it} is zero"
            found.append(f"{listed_names(cancelled)} is zero in every entry: {reason}.")
        return (
            f"The Fisher of {' The Fisher of '.join(found)} This task does not protect "
            f"{'it' if len(names) == 1 else 'them'}."
        )

    def _slow_message(self) -> str:
        names: dict[str, list[str]] = {}
        for name, reason in self.squares.reasons.items():
            names.setdefault(reason, []).append(name)
        found = [
            f"{listed_names(some)}, because {reason}. Fix: {fix(reason)}."
            for reason, some in names.items()
        ]
        return (
            "The samples of this task were run one at a time, which gives the same Fisher and "
            f"takes longer, for {' Also for '.join(found)}"
        )


def _zero_names(fisher: Mapping[str, Tensor], ranks: Ranks) -> list[str]:
    """The names of the parameters whose Fisher is zero in every entry, on every process.

    Raises:
        ValueError: It is zero for all parameters.
    """
    device = next(iter(fisher.values())).device
    # The largest entry takes a fraction of the time of `any`.
    tops = [largest_entry(local(each)).to(device) for each in fisher.values()]
    nonzero = torch.stack(tops) != 0
    with ranks.exchange("which Fisher entries are zero"):
        any_nonzero = ranks.maximum(nonzero.to(torch.uint8)).tolist()
    names = [name for name, flag in zip(fisher, any_nonzero, strict=True) if not flag]
    if len(names) == len(fisher):
        raise ValueError(
            "The negative log-likelihood must depend on the parameters; found that the Fisher of "
            "every parameter is zero, so that nothing would be protected. Fix: if the model fits "
            'these data perfectly, use fisher_type="exact" or "mc", or consolidate earlier. If the '
            "loss compares the samples of a batch, it is constant for a single one: make the "
            "samples that it compares one sample, [1, B, ...]. Otherwise check whether the outputs "
            "are detached, all positions are masked or ignored, the outputs use other parameters "
            "only, or weight is so small that the Fisher underflows."
        )
    return names
