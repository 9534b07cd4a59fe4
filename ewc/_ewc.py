"""`EWC`, the object that users hold: it connects Fisher estimate, state and penalty.

The Fisher is computed in `ewc.fisher`, and merged with that of earlier tasks in `ewc.quadratic`.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ewc import _vmap
from ewc._agreement import agree_on
from ewc._consolidation import Task
from ewc._copying import Copied
from ewc._options import FisherType, Reduction
from ewc._restoring import Restore
from ewc._settings import Settings
from ewc._strength import Strength
from ewc._summary import Curvature, Summary, check_finite_curvature, measure
from ewc.data.calling import Forward, check_forward
from ewc.fisher.environment import undisturbed
from ewc.fisher.verified import LastVerification
from ewc.likelihoods import Likelihood
from ewc.likelihoods.likelihood import check_likelihood
from ewc.model.names import named_parameters, unwrap
from ewc.model.selection import check_released, collectable, select, trainable, without
from ewc.model.turns import turn
from ewc.model.wrappers import check_model
from ewc.processes.groups import ranks_of, ranks_of_shards, wrapper_group
from ewc.processes.ranks import SINGLE_PROCESS
from ewc.quadratic.binding import Binding, traced_penalty
from ewc.quadratic.checkpoint import dump, restore
from ewc.quadratic.merging import Merging
from ewc.quadratic.penalty import origin, zero
from ewc.quadratic.point import checked_point
from ewc.quadratic.replacement import rebound, warn_of_replaced
from ewc.quadratic.state import State, check_fit

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class EWC(Copied):
    r"""Elastic Weight Consolidation: a penalty that protects earlier tasks during training.

    The penalty after `T` consolidations is::

        strength / 2 * sum over t <= T and entries i of F[t, i] * (theta[i] - anchor[t, i])^2

    `F[t]` is the diagonal Fisher information at the end of task `t`: the mean over samples of the
    squared gradient of the sample's negative log-likelihood, in nats. `anchor[t]` holds the
    parameters at that time. The sum is stored as one quadratic, so time and memory do not depend on
    the number of tasks.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017,
    eq. 3.

    Args:
        model: The model whose parameters are protected, wrapped (DDP, compiled, ...) or not.
        likelihood: The distribution of the targets that the outputs describe.
        strength: lambda, a finite number `>= 0`; or `"auto"`: 5 divided by the largest entry of the
            penalty's curvature, computed again after each consolidation. The scale of the curvature
            then has no effect.
        parameters: Names, or `(name, parameter)` pairs of this model. `None`: every parameter with
            `requires_grad` when a consolidation starts.
        forward: `forward(model, batch) -> outputs`. `None`: the model is called on the inputs of
            the batch. The function may be called on any part of a batch, also inside
            `torch.func.vmap`.
        fisher_type: `"empirical"` (the targets in the data), `"exact"` (the expectation over the
            model's predictive distribution) or `"mc"` (one draw from it per sample).
        reduction: `"mean"`: the Fisher is averaged over samples. `"sum"`: it is `N` times that.
        max_samples: The most samples per consolidation, over all processes together.
        process_group: The group over which batches are sharded. `None`: that of the
            `DistributedDataParallel` wrapper or of `fully_shard`, else the world. With a group of
            one rank, a process runs over all the data. Shared by `deepcopy`, dropped by pickle.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: An argument is out of range, or there is no parameter to protect.

    Example:
        >>> regularizer = EWC(model, Classification())
        >>> for loader in tasks:
        ...     for x, y in loader:
        ...         loss = F.cross_entropy(model(x), y) + regularizer()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        ...     summary = regularizer.consolidate(loader)
        >>> regularizer.n_tasks
        2
    """

    _kind = "EWC"  # identifies the class in a state, whatever a subclass is called

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        strength: float | Literal["auto"] = "auto",
        parameters: Iterable[str | tuple[str, nn.Parameter]] | None = None,
        forward: Forward | None = None,
        fisher_type: FisherType = "empirical",
        reduction: Reduction = "mean",
        max_samples: int | None = None,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        check_model(model)
        self._curvature: Mapping[str, Curvature] = {}
        self.strength = strength
        self._settings = Settings.checked(fisher_type, reduction, max_samples)
        check_likelihood(likelihood, self._settings.fisher_type)
        check_forward(forward)
        self._likelihood, self._forward = likelihood, forward
        self._process_group = wrapper_group(model) if process_group is None else process_group
        self._model = unwrap(model)
        self._chosen = None if parameters is None else select(model, parameters)
        self._state = State()
        self._binding: Binding | None = None
        self._merging = Merging()
        self._verification = LastVerification()
        parameters = collectable(self._model, self._chosen)
        self._origin = origin(next(iter(parameters.values())).device)

    @property
    def strength(self) -> float:
        """lambda, the number in use. An assignment affects the next penalty.

        With `"auto"` it is 0 before the first consolidation. An assigned number stays in use until
        `"auto"` is assigned.
        """
        return self._strength

    @strength.setter
    def strength(self, value: float | Literal["auto"]) -> None:
        option = Strength.checked(value)
        found = option, option.in_use(self._curvature.values())
        self._strength_option, self._strength = found

    @property
    def n_tasks(self) -> int:
        """The number of consolidations."""
        return self._state.n_tasks

    @property
    def fisher(self) -> dict[str, Tensor]:
        """The Fisher information of all tasks as one, by canonical name.

        Tensors of the parameters' shapes: copies, real and `>= 0`, in at least float32.
        """
        return {name: q.fisher.clone() for name, q in self._state.quadratics_like(self._model)}

    @property
    def anchor(self) -> dict[str, Tensor]:
        """The minimiser of the penalty, by canonical name.

        Tensors of the parameters' shapes: copies, in at least float32.
        """
        return {name: q.anchor.clone() for name, q in self._state.quadratics_like(self._model)}

    def __call__(self, at: Mapping[str, Tensor] | None = None) -> Tensor:
        """Compute the penalty.

        If parameters are sharded, all processes must call this. The call does not synchronise with
        a device, and switches autocast off inside.

        Args:
            at: Tensors of the parameters' shapes, by name, at which the penalty is evaluated: for
                instance the output of a hypernetwork, or `base + scale * B @ A` of an adapter. For
                all other names, the model's own parameters are used.

        Returns:
            A differentiable scalar, shape `[]`, in at least float32, on the device of the first
            protected parameter. It is 0 before the first consolidation.

        Raises:
            TypeError: `at` is not a mapping.
            ValueError: A protected parameter is gone, or has changed its shape other than by
                growing along dimension 0; or a tensor of `at` fits no parameter.

        Warns:
            ReplacedParameterWarning: Once for each protected parameter that another object with
                other values has replaced, such as the weight of a new head.
        """
        precision = self._merging.precision
        if not self._state.quadratics:
            checked_point(at, self._model, {})
            thetas = trainable(self._model, self._chosen) or named_parameters(self._model)
            return zero([*thetas.values()], self._origin)
        if torch.compiler.is_compiling() or _vmap.level():  # each transforms plain operations
            return traced_penalty(self._model, self._state, precision, self._strength, at)
        if self._binding is None or not self._binding.is_current(self._state):
            check_fit(self._model, self._state, self._chosen or ())
            self._binding = rebound(self._binding, self._model, self._state, precision)
            self._state = self._binding.state
        point = checked_point(at, self._model, self._binding.live.by_name)
        return self._binding.penalty(self._strength, point)

    def consolidate(
        self,
        batches: Iterable[Any],
        *,
        likelihood: Likelihood | None = None,
        forward: Forward | None = None,
        dataset_size: int | None = None,
        weight: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Summary:
        """Add a task to the penalty: the current parameters become its solution.

        One pass over the batches estimates the Fisher information. Then Fisher and anchor are
        committed. If the call raises an error, this object and the model are as before. Two calls
        count as two tasks.

        In distributed training all processes must call this, each with its own share of the data;
        those of a tensor-parallel group pass the same batches. The result is that of one process
        with all samples.

        Args:
            batches: Any iterable of batches of the task. Small batches of a list, a tuple or a
                `DataLoader` are read ahead and run together, which is faster.
            likelihood: For this task only, for instance with the outputs of its own head.
            forward: For this task only.
            dataset_size: The number of samples of the task, used only by `reduction="sum"`. By
                default the samples seen, or `len(batches.dataset)` if `max_samples` has ended the
                pass early.
            weight: The factor of this task's Fisher information, finite and `> 0`.
            generator: Draws the targets of `fisher_type="mc"`. By default the global generator.

        Returns:
            A summary of this consolidation, and of the curvature that the penalty has after it.

        Raises:
            TypeError: An argument has a wrong type.
            ValueError: An argument, the data or the likelihood is invalid, every entry of the
                Fisher is zero, or the processes differ in what must be the same.
            RuntimeError: The call failed on another process.

        Warns:
            ZeroFisherWarning: Once for each parameter whose Fisher is zero in every entry.
            SlowPathWarning: Once, if more than a few samples of each batch were run one at a time.
            ReplacedParameterWarning: As for the penalty.
        """
        undo: list[Restore] = []

        def run() -> Summary:
            committed = self._state, self._curvature, self._binding
            undo.append(lambda: self._commit(*committed))
            ranks = ranks_of(self._model, self._process_group)
            with ranks.all_or_none():
                task = Task.checked(
                    batches,
                    self._likelihood if likelihood is None else likelihood,
                    self._forward if forward is None else forward,
                    dataset_size,
                    weight,
                    generator,
                    fisher_type=self._settings.fisher_type,
                )
                check_fit(self._model, self._state, self._chosen or ())
                parameters = collectable(self._model, self._chosen)
                options = {**self._configuration(), "strength": self._strength_option.written}
                agree_on(task, ranks, self._model, self._state, parameters, self._settings, options)
                estimate = task.estimate(
                    self._model, parameters, self._settings, ranks, undo, self._verification
                )
                binding, summary = estimate.merged_into(
                    self._state,
                    self._model,
                    parameters,
                    self._merging,
                    self._strength_option,
                    ranks,
                )
                estimate.warn(self._state)
                warn_of_replaced(self._binding, binding)
                ranks.finish(undo)
                self._commit(binding.state, summary.parameters, binding)
            return summary

        with turn(self._model):
            return undisturbed(run, on_failure=undo)

    def forget(self, *names: str) -> None:
        """Release parameters: drop their Fisher and anchor, so that the penalty omits them.

        The next consolidation protects them again if they are still in the model.

        Args:
            *names: Canonical names. All are validated before any is released.

        Raises:
            TypeError: No name is given, or a name is not a string.
            ValueError: A name is unknown.
        """
        chosen = self._chosen or ()
        check_released(names, [*self._state.quadratics, *chosen, *named_parameters(self._model)])
        self._chosen = without(self._model, self._chosen, frozenset(names))
        kept = {name: each for name, each in self._curvature.items() if name not in names}
        self._commit(self._state.without(names), kept, self._binding)

    def state_dict(self, *, full: bool = False) -> dict[str, Any]:
        """The state for a checkpoint: nested dicts of plain values and copies of tensors.

        The state does not include `strength`, which belongs to the run.

        Args:
            full: Whether to return full tensors instead of sharded ones, for `torch.save`. This is
                a collective: call it on every process. Without sharded parameters it has no effect.

        Raises:
            ValueError: A protected parameter is gone or has changed its shape.
        """
        ranks = ranks_of_shards(self._model) if full else SINGLE_PROCESS
        with ranks.all_or_none(), torch.inference_mode(False), torch.no_grad():
            check_fit(self._model, self._state, self._chosen or ())
            return dump(
                self._state,
                model=self._model,
                trainable=trainable(self._model, self._chosen),
                configuration=self._configuration(),
                full=full,
                ranks=ranks,
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned, onto the devices of this model.

        The state is validated completely before anything changes. If parameters are sharded, all
        processes must call this, with full tensors or sharded ones.

        Args:
            state: The return value of `state_dict`. It is copied.

        Raises:
            TypeError: `state` is not a dict.
            ValueError: `state` does not fit this object or its model. The message lists all
                problems.

        Warns:
            UserWarning: The state does not cover parts of the model. They are free until the next
                consolidation.
            NothingProtectedWarning: The state protects nothing at all.
        """
        ranks = ranks_of_shards(self._model)
        with ranks.all_or_none(), torch.inference_mode(False), torch.no_grad():
            restored = restore(
                state,
                model=self._model,
                trainable=trainable(self._model, self._chosen),
                configuration=self._configuration(),
                ranks=ranks,
            )
            with ranks.exchange("the curvature"):
                curvature = measure(self._merging.precisions(restored.quadratics))
            check_finite_curvature(curvature)
            ranks.finish()
            self._commit(restored.warned_like(self._state), curvature)

    def _commit(
        self, state: State, curvature: Mapping[str, Curvature], binding: Binding | None = None
    ) -> None:
        """Replace the state, and what follows from it."""
        found = state, binding, curvature, self._strength_option.in_use(curvature.values())
        # One statement: Python raises `KeyboardInterrupt` before it or after it.
        self._state, self._binding, self._curvature, self._strength = found

    def __repr__(self) -> str:
        automatic = " (auto)" if self._strength_option.is_automatic else ""
        return (
            f"{type(self).__name__}(strength={self.strength:g}{automatic}, "
            f"fisher_type={self._settings.fisher_type!r}, reduction={self._settings.reduction!r}, "
            f"n_tasks={self.n_tasks}, parameters={len(self._state.quadratics)})"
        )

    def _configuration(self) -> dict[str, Any]:
        """The options that give the numbers in a state their meaning."""
        return {
            "kind": self._kind,
            **self._settings.configuration(),
            **self._merging.configuration(),
        }
