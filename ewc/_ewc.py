"""Elastic Weight Consolidation as one object beside the optimizer.

It holds what consolidations have learned, follows the model's parameters by name, and turns both
into a penalty. What is a Fisher is decided in `ewc.fisher`, what is a quadratic in
`ewc.quadratic.quadratic`; here they are put together, all or nothing.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from ewc._checks import check_initialised, check_materialised, choice, number, positive_int
from ewc._estimate import (
    samples_in,
    silent_in,
    silent_message,
    slow_message,
)
from ewc._options import FisherType, Reduction
from ewc._summary import Summary, measure
from ewc.data.calling import Forward
from ewc.errors import SlowPathWarning, ZeroFisherWarning
from ewc.fisher import collect
from ewc.likelihoods import Likelihood
from ewc.model.names import find, in_order, named_parameters, nearest, unwrap
from ewc.model.randomness import Randomness
from ewc.model.selection import select
from ewc.processes.groups import ranks_of, wrapper_group
from ewc.processes.layout import has_sharded_parameters
from ewc.processes.ranks import SINGLE_PROCESS
from ewc.quadratic.binding import Binding, traced_penalty
from ewc.quadratic.checkpoint import dump, restore
from ewc.quadratic.penalty import result_dtype
from ewc.quadratic.quadratic import Quadratic, snapshot
from ewc.quadratic.state import State, check_finite, check_fit

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MEANS_TO_SUPPORT = {
    "exact": "exact_terms(outputs, *rest) -> [K, N]",
    "mc": "sample(outputs) -> targets",
}


class EWC:
    r"""Protect what a model has learned, task after task, by Elastic Weight Consolidation.

    The penalty after `T` consolidations is

        strength / 2 * sum over t <= T and entries i of F[t, i] * (theta[i] - anchor[t, i])^2

    where `F[t]` is the diagonal Fisher information at the end of task `t`: the mean over samples
    of the squared gradient of the sample's negative log-likelihood. The sum is kept as one
    quadratic, so time and memory do not depend on the number of tasks.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017,
    eq. 3.

    Args:
        model: The model whose parameters are protected, wrapped (DDP, compiled, ...) or not.
        likelihood: What the outputs mean.
        strength: lambda, a finite number `>= 0`.
        parameters: `None`: every parameter with `requires_grad` when a consolidation starts. Else
            names, or `(name, parameter)` pairs of this model.
        forward: `forward(model, batch) -> outputs`, where calling the model on the batch's inputs
            is not enough. It may be handed any part of a batch, also inside `torch.func.vmap`.
        fisher_type: `"empirical"` (the targets in the data), `"exact"` (the expectation over the
            model's predictive distribution) or `"mc"` (one draw from it per sample).
        reduction: `"mean"`: the Fisher is averaged over samples. `"sum"`: it is the sum over all
            samples of the task, `N` times that.
        max_samples: At most so many samples per consolidation, over all processes together.
        process_group: Where batches are sharded over processes. `None`: the group of the
            `DistributedDataParallel` wrapper, or the mesh of `fully_shard`, else the world, if it
            is initialised. A group of one rank opts out: that process runs over all the data
            itself. Shared by `copy.deepcopy`, dropped by pickle.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument is out of range, or there is no parameter to protect.

    Example:
        >>> ewc = EWC(model, Classification(), strength=300.0)
        >>> for loader in tasks:
        ...     for x, y in loader:
        ...         loss = F.cross_entropy(model(x), y) + ewc()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        ...     summary = ewc.consolidate(loader)
        >>> ewc.n_tasks
        2
    """

    _kind = "EWC"  # what the state calls itself, whatever a subclass is called

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        strength: float = 1.0,
        parameters: Iterable[str | tuple[str, nn.Parameter]] | None = None,
        forward: Forward | None = None,
        fisher_type: FisherType = "empirical",
        reduction: Reduction = "mean",
        max_samples: int | None = None,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module; found {type(model).__name__}.")
        self.strength = strength
        self._fisher_type: FisherType = choice("fisher_type", fisher_type, get_args(FisherType))
        self._reduction: Reduction = choice("reduction", reduction, get_args(Reduction))
        self._likelihood = self._checked_likelihood(likelihood)
        self._forward = _checked_forward(forward)
        self._max_samples = (
            None if max_samples is None else positive_int("max_samples", max_samples)
        )
        self._process_group = wrapper_group(model) if process_group is None else process_group
        self._model = unwrap(model)
        self._chosen = None if parameters is None else select(model, parameters)
        self._state = State()
        self._binding: Binding | None = None
        self._to_collect()

    @property
    def strength(self) -> float:
        """lambda, a finite number `>= 0`. Assigning it changes the next penalty."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = number("strength", value)

    @property
    def n_tasks(self) -> int:
        """How many consolidations there were."""
        return self._state.n_tasks

    @property
    def fisher(self) -> dict[str, Tensor]:
        """The Fisher of all tasks together, by canonical name; copies, in at least float32."""
        return self._copies(lambda quadratic: quadratic.fisher)

    @property
    def anchor(self) -> dict[str, Tensor]:
        """Where the penalty is smallest, by canonical name; copies, in at least float32."""
        return self._copies(lambda quadratic: quadratic.anchor)

    def __call__(self) -> Tensor:
        """The penalty.

        Returns:
            A differentiable scalar on the (first) protected parameter's device, in at least
            float32; 0 before the first consolidation. Nothing is synchronised, and autocast is
            off inside. Where parameters are sharded, it is the same number on every process, and
            all of them must call this.

        Raises:
            ValueError: A protected parameter is gone or has changed its shape, other than by
                growing along dimension 0.
        """
        if not self._state.quadratics:
            return self._zero()
        if torch.compiler.is_compiling():
            return traced_penalty(self._model, self._state, self._precision, self._strength)
        if self._binding is None or not self._binding.is_current(self._state):
            self._check_fit()
            with torch.inference_mode(False), torch.no_grad():
                self._binding = Binding(self._model, self._state, self._precision)
            self._state = self._binding.state
        return self._binding.penalty(self._strength)

    def consolidate(
        self,
        batches: Iterable[Any],
        *,
        likelihood: Likelihood | None = None,
        forward: Forward | None = None,
        dataset_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Summary:
        """Take the model as it is now for the solution of one more task, and protect it.

        One pass over the batches; then Fisher and anchor are committed, all or nothing: whatever
        goes wrong, this object and the model are as before. Called twice, it counts two tasks.

        With several processes, each runs over its own part of the data and all of them must call
        this; the result is that of one process that has seen all samples, and it fails on all if
        it fails on one.

        Args:
            batches: Any iterable of batches of the task. A list, a tuple or a `DataLoader` is read
                ahead, and its small batches are run together, which is faster; those of any
                other iterable are run as they come.
            likelihood: For this task only, for instance with the outputs of its own head.
            forward: For this task only.
            dataset_size: N of `reduction="sum"`, which alone reads it. By default the samples
                seen, or `len(batches.dataset)` if `max_samples` has cut the pass short.
            generator: Source of the draws of `fisher_type="mc"`. By default the global one.

        Returns:
            What was done, and the curvature of the penalty from now on.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: An argument is out of range, the data or the likelihood is not as it
                should be, every entry of the Fisher is zero, or the processes differ in what must
                be the same on all of them.
            RuntimeError: It has failed on another process.

        Warns:
            ZeroFisherWarning: Once for each parameter whose Fisher is all zero.
            SlowPathWarning: Once, where most samples had to be run one at a time.
        """
        ranks = ranks_of(self._model, self._process_group)
        with ranks.all_or_none():
            if not isinstance(batches, Iterable):
                raise TypeError(
                    "batches must be an iterable of batches, such as a DataLoader; found "
                    f"{type(batches).__name__}."
                )
            likelihood = (
                self._likelihood if likelihood is None else self._checked_likelihood(likelihood)
            )
            forward = self._forward if forward is None else _checked_forward(forward)
            if dataset_size is not None:
                dataset_size = positive_int("dataset_size", dataset_size)
            if generator is not None and not isinstance(generator, torch.Generator):
                raise TypeError(
                    f"generator must be a torch.Generator; found {type(generator).__name__}."
                )
            self._check_fit()
            parameters = self._to_collect()
            ranks.agree(self._common(parameters, dataset_size))

            randomness = Randomness(parameter.device for parameter in parameters.values())
            with randomness.unchanged_on_failure(generator):
                squares = collect(
                    self._model,
                    parameters,
                    batches,
                    likelihood=likelihood,
                    forward=forward,
                    fisher_type=self._fisher_type,
                    max_samples=self._max_samples,
                    generator=generator,
                    ranks=ranks,
                )
                with torch.inference_mode(False), torch.no_grad():
                    weight = 1
                    if self._reduction == "sum":
                        weight = samples_in(batches, squares, dataset_size, ranks)
                    fisher = {
                        name: each.div_(squares.samples / weight).contiguous()
                        for name, each in squares.sums.items()
                    }
                    silent = silent_in(fisher, ranks)
                    state = self._merged_state(parameters, fisher, silent, squares.slow)
                    binding = Binding(self._model, state, self._precision)
                    summary = Summary(
                        n_tasks=state.n_tasks,
                        samples=squares.samples,
                        parameters=measure(binding.precisions),
                        paths=dict(squares.paths),
                        reasons=dict(squares.reasons),
                    )
                for name in silent:
                    if name not in self._state.warned and parameters[name].numel():
                        warnings.warn(
                            silent_message(name, squares), ZeroFisherWarning, stacklevel=2
                        )
                if squares.slow and not self._state.warned_slow:
                    warnings.warn(slow_message(squares), SlowPathWarning, stacklevel=2)
                ranks.barrier("the end")
        self._state, self._binding = binding.state, binding
        return summary

    def forget(self, *names: str) -> None:
        """Release parameters: what was learned about them is dropped, and they are free.

        Those that are still in the model are collected again by the next consolidation.

        Args:
            *names: Canonical names. All are validated before any is released.

        Raises:
            TypeError: There is no name, or one is not a string.
            ValueError: A name is unknown.
        """
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError(f"forget takes one or more names of parameters; found {names!r}.")
        chosen = self._chosen or ()
        known = [*self._state.quadratics, *chosen, *named_parameters(self._model)]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                "forget takes names of protected parameters; unknown: "
                + "; ".join(f"{name!r} ({nearest(name, known)})" for name in unknown)
                + "."
            )
        kept = {
            name: quadratic
            for name, quadratic in self._state.quadratics.items()
            if name not in names
        }
        if self._chosen is not None:
            # Those that are gone from the model can never be collected again.
            self._chosen = tuple(
                name for name in chosen if name not in names or find(self._model, name) is not None
            )
        self._state = replace(self._state, quadratics=kept)

    def state_dict(self, *, full: bool = False) -> dict[str, Any]:
        """What was learned, for a checkpoint: nested dicts of tensors and plain values.

        `strength` is not in it: it belongs to the run. The tensors are copies.

        Args:
            full: Whole tensors where parameters are sharded, for `torch.save`. A collective: call
                it on every process. Without sharded parameters, it makes no difference.

        Raises:
            ValueError: A protected parameter is gone or has changed its shape.
        """
        self._check_fit()
        with torch.inference_mode(False), torch.no_grad():
            return dump(self._state, self._all_protected(), self._configuration(), full=full)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what another object has learned, on this model's devices.

        Everything is validated first; on any error, nothing has changed. Where parameters are
        sharded, all processes must call this, with whole tensors or sharded ones.

        Args:
            state: What `state_dict` returned. It is copied.

        Raises:
            TypeError: `state` is not a dict.
            ValueError: It is of another version, class, configuration or model; all that is wrong
                is listed.

        Warns:
            UserWarning: Once, where the model has parts that the state does not cover. They are
                free until the next consolidation.
            NothingProtectedWarning: Instead, where the state protects nothing at all.
        """
        ranks = (
            ranks_of(self._model, self._process_group)
            if has_sharded_parameters(self._model)
            else SINGLE_PROCESS
        )
        with ranks.all_or_none(), torch.inference_mode(False), torch.no_grad():
            restored = restore(
                state,
                model=self._model,
                protected=self._trainable(),
                configuration=self._configuration(),
                ranks=ranks,
            )
            ranks.barrier("the end")
        self._state = replace(
            restored, warned=self._state.warned, warned_slow=self._state.warned_slow
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(strength={self.strength:g}, "
            f"fisher_type={self._fisher_type!r}, reduction={self._reduction!r}, "
            f"n_tasks={self.n_tasks}, parameters={len(self._state.quadratics)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Handles on processes and on the dictionaries of a live model do not travel.
        return {**self.__dict__, "_binding": None, "_process_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "EWC":
        other = object.__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        other._process_group = self._process_group
        return other

    # What OnlineEWC does otherwise.

    def _configuration(self) -> dict[str, Any]:
        """What gives the numbers in a state their meaning."""
        return {
            "kind": self._kind,
            "fisher_type": self._fisher_type,
            "reduction": self._reduction,
        }

    def _merged(self, known: Quadratic | None, fisher: Tensor, anchor: Tensor) -> Quadratic:
        """What is known of a parameter after this task, which has collected it."""
        return Quadratic(fisher, anchor) if known is None else known.plus(fisher, anchor)

    def _passed(self, known: Quadratic) -> Quadratic:
        """What is known of a parameter after this task, which has not collected it."""
        return known

    def _precision(self, name: str, known: Quadratic) -> Tensor:
        """The curvature of the penalty, before `strength`."""
        return known.fisher

    # The parameters, as they are now.

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that a consolidation would collect now."""
        candidates = named_parameters(self._model)
        if self._chosen is not None:
            found = [find(self._model, name) for name in self._chosen]
            chosen = {id(parameter) for parameter in found}  # some may have been tied since
            candidates = {name: p for name, p in candidates.items() if id(p) in chosen}
        return {name: p for name, p in candidates.items() if p.requires_grad}

    def _to_collect(self) -> dict[str, nn.Parameter]:
        """The same, if they can be collected."""
        trainable = self._trainable()
        if not trainable:
            raise ValueError(
                "There must be a parameter to protect; found none with requires_grad among "
                f"{'the names given' if self._chosen is not None else 'those of the model'}."
            )
        check_materialised(trainable.items())
        check_initialised(named_parameters(self._model).items())
        return trainable

    def _all_protected(self) -> dict[str, nn.Parameter]:
        """Those that have a quadratic, and those that the next consolidation would give one."""
        names = in_order(self._model, [*self._state.quadratics, *self._trainable()])
        found = {name: find(self._model, name) for name in names}
        return {name: p for name, p in found.items() if p is not None}

    def _common(
        self, parameters: Mapping[str, nn.Parameter], dataset_size: int | None
    ) -> dict[str, Any]:
        """What must be the same on every process."""
        configuration = self._configuration()
        return {
            **{f"the shape of {name!r}": tuple(p.shape) for name, p in parameters.items()},
            **{key: one for key, one in configuration.items() if not isinstance(one, dict)},
            "strength": self._strength,
            "max_samples": self._max_samples,
            "dataset_size": dataset_size,
            "n_tasks": self.n_tasks,
        }

    def _check_fit(self) -> None:
        check_fit(self._model, self._state, self._chosen or ())

    # From Fisher to penalty.

    def _merged_state(
        self,
        parameters: Mapping[str, nn.Parameter],
        fisher: Mapping[str, Tensor],
        silent: list[str],
        slow: bool,
    ) -> State:
        merged = {}
        for name in in_order(self._model, [*self._state.quadratics, *parameters]):
            known = self._state.quadratics.get(name)
            if name in parameters:
                parameter = parameters[name]
                beside = None if known is None else known.like(parameter)
                merged[name] = self._merged(beside, fisher[name], snapshot(parameter))
            elif known is not None:
                merged[name] = self._passed(known)
        check_finite(merged, self._reduction)
        return State(
            merged,
            self._state.n_tasks + 1,
            self._state.warned.union(silent),
            self._state.warned_slow or slow,
        )

    def _zero(self) -> Tensor:
        parameters = list(self._trainable().values()) or list(self._model.parameters())
        return torch.zeros((), dtype=result_dtype(parameters), device=parameters[0].device)

    def _copies(self, of: Callable[[Quadratic], Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, known in self._state.quadratics.items():
            parameter = find(self._model, name)
            if parameter is not None and not parameter.is_meta:
                known = known.like(parameter)
            copies[name] = of(known).clone()
        return copies

    def _checked_likelihood(self, likelihood: Likelihood) -> Likelihood:
        if not isinstance(likelihood, Likelihood):
            raise TypeError(
                "likelihood must be a Likelihood, such as Classification(); found "
                f"{likelihood!r}. For a function, use Custom(nll)."
            )
        if not likelihood.supports(self._fisher_type):
            raise ValueError(
                f"fisher_type={self._fisher_type!r} needs a likelihood that defines "
                f"{_MEANS_TO_SUPPORT[self._fisher_type]}; {type(likelihood).__name__} does not. "
                'Define it, or take fisher_type="empirical".'
            )
        return likelihood


def _checked_forward(forward: Forward | None) -> Forward | None:
    if forward is not None and not callable(forward):
        raise TypeError(
            "forward must be a function forward(model, batch) -> outputs; found "
            f"{type(forward).__name__}."
        )
    return forward
