"""Online EWC: one Fisher, in which earlier tasks decay, and the latest anchor.

Here is what differs from `EWC`: how a task updates the quadratic, and the curvature of the penalty,
which is the Fisher decayed once more, plus a prior.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from ewc._checks import listed, number
from ewc._ewc import EWC
from ewc._options import FisherType, Reduction
from ewc.data.calling import Forward
from ewc.errors import NothingProtectedWarning
from ewc.likelihoods import Likelihood
from ewc.model.names import find, named_parameters, with_nearest
from ewc.processes.layout import with_layout_of
from ewc.quadratic.merging import Merging
from ewc.quadratic.quadratic import Quadratic
from ewc.quadratic.values import is_foreign, plain_name, plain_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class OnlineEWC(EWC):
    r"""Online EWC: one anchor, and Fisher information in which earlier tasks decay.

    After task `t`, with `theta` for the parameters::

        F~[t] = F[t] + decay * F~[t-1]
        penalty = strength / 2 * sum of (decay * F~[t] + prior_precision) * (theta - anchor)^2

    `F[t]` is the diagonal Fisher information of task `t`, as for `EWC`, and `anchor` holds the
    parameters after the latest task. The property `fisher` is `F~`, without the prior. A parameter
    that is frozen during a consolidation keeps its anchor, and its Fisher information decays.

    Source: Schwarz et al., "Progress & Compress", ICML 2018, eq. 8.

    The methods, and all arguments before `decay`, are those of `EWC`.

    Args:
        model: The model whose parameters are protected, wrapped (DDP, compiled, ...) or not.
        likelihood: The distribution of the targets that the outputs describe.
        strength: lambda, a finite number `>= 0`, or `"auto"`.
        parameters: Names, or `(name, parameter)` pairs; `None`: every parameter with
            `requires_grad` when a consolidation starts.
        forward: `forward(model, batch) -> outputs`. `None`: the model is called on the inputs.
        fisher_type: `"empirical"`, `"exact"` or `"mc"`.
        reduction: `"mean"` or `"sum"` over the samples of a task.
        max_samples: The most samples per consolidation, over all processes together.
        process_group: The group over which batches are sharded.
        decay: gamma, the factor of earlier Fisher information, in `[0, 1]`.
        prior_precision: The precision of a Gaussian prior around the anchor: a number `>= 0`, or
            `{name: tensor}` of the parameters' shapes. Other parameters have no prior, nor do rows
            that a parameter gains later. The prior is added once, from the first consolidation of a
            parameter on. It does not decay, and is multiplied by `strength`.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: An argument is out of range, or does not fit the model.

    Warns:
        NothingProtectedWarning: `decay` is 0 and there is no prior, so the penalty is always 0.

    Example:
        >>> regularizer = OnlineEWC(model, Classification(), decay=0.9)
        >>> for loader in tasks:
        ...     summary = regularizer.consolidate(loader)
        >>> torch.equal(regularizer.anchor["weight"], model.weight)
        True
    """

    _kind = "OnlineEWC"

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
        decay: float = 1.0,
        prior_precision: float | Mapping[str, Tensor] = 0.0,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            strength=strength,
            parameters=parameters,
            forward=forward,
            fisher_type=fisher_type,
            reduction=reduction,
            max_samples=max_samples,
            process_group=process_group,
        )
        decay = number("decay", decay, high=1.0)
        prior: float | dict[str, Tensor]
        if isinstance(prior_precision, Mapping):
            prior = _checked_priors(prior_precision, self._model)
        else:
            prior = number("prior_precision", prior_precision)
        if decay == 0 and not prior:
            warnings.warn(
                "decay must be > 0 without a prior_precision; found 0, which makes every "
                "penalty 0. Fix: pass a decay > 0, or a prior_precision.",
                NothingProtectedWarning,
                stacklevel=2,
            )
        self._merging = DecayedMerging(decay, prior)


class DecayedMerging(Merging):
    """The decayed sum of the Fisher information around the latest anchor, and a prior.

    Args:
        decay: gamma.
        prior: The precision of the prior: a number for all parameters, or a tensor by name.
    """

    def __init__(self, decay: float, prior: float | dict[str, Tensor]) -> None:
        self._decay = decay
        self._prior = prior

    @override
    def configuration(self) -> dict[str, Any]:
        prior = self._prior
        if isinstance(prior, dict):
            prior = {name: one.clone() for name, one in prior.items()}
        return {"decay": self._decay, "prior_precision": prior}

    @override
    def updated(
        self, old: Quadratic | None, fisher: Tensor, anchor: Tensor
    ) -> tuple[Quadratic, Tensor | None]:
        if old is None:
            return Quadratic(fisher, anchor), None
        anchor = anchor.to(old.anchor.dtype)  # never narrowed
        earlier = old.grown(anchor).fisher
        # In the memory of `fisher`, unless a loaded state is wider.
        merged = fisher.to(torch.promote_types(fisher.dtype, earlier.dtype))
        return Quadratic(merged.add_(earlier, alpha=self._decay), anchor), None

    @override
    def not_collected(self, old: Quadratic) -> Quadratic:
        return Quadratic(self._decay * old.fisher, old.anchor)

    @override
    def precision(self, name: str, quadratic: Quadratic) -> Tensor:
        fisher = quadratic.fisher if self._decay == 1 else self._decay * quadratic.fisher
        if not isinstance(self._prior, dict):
            return fisher + self._prior if self._prior else fisher
        if name not in self._prior:
            return fisher
        prior = self._prior[name].to(fisher.device, fisher.dtype)
        if prior.dim():
            prior = prior[: fisher.shape[0]]  # rows that a state leaves free have none yet
        if prior.dim() and prior.shape[0] < fisher.shape[0]:
            prior = torch.cat([prior, prior.new_zeros(fisher[prior.shape[0] :].shape)])
        return fisher + with_layout_of(prior, fisher)


def _checked_priors(priors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    problems = []
    unknown: list[object] = []
    for name, prior in priors.items():
        parameter = find(model, name) if isinstance(name, str) else None
        if parameter is None:
            unknown.append(name)
        elif not isinstance(prior, Tensor):
            problems.append(f"{name!r} has a {type(prior).__name__} for a tensor")
        elif prior.is_nested or prior.layout is not torch.strided or is_foreign(prior):
            problems.append(f"{name!r} has a tensor that is not dense and plain")
        elif prior.is_meta:
            problems.append(f"{name!r} has a tensor on the meta device, without values")
        elif prior.is_complex() or prior.dtype is torch.bool:
            problems.append(f"{name!r} has dtype {prior.dtype}")
        elif prior.shape != parameter.shape:
            problems.append(
                f"{name!r} has shape {tuple(prior.shape)}, the parameter {tuple(parameter.shape)} "
                "(nothing is broadcast)"
            )
        elif not (prior.isfinite() & (prior >= 0)).all():
            problems.append(f"{name!r} has negative, infinite or NaN entries")
    if unknown:
        known = list(named_parameters(model))
        problems.append(f"no parameter is named {with_nearest(unknown, known)}")
    if problems:
        raise ValueError(
            "prior_precision must be a number >= 0 or {name: tensor} with finite entries >= 0 and "
            "the parameters' shapes; found: " + listed(problems, "; ") + "."
        )
    return {
        plain_name(name): plain_tensor(prior).to(
            torch.promote_types(prior.dtype, torch.float32), copy=True
        )
        for name, prior in priors.items()
    }
