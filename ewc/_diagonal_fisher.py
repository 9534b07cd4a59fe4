"""The diagonal Fisher information alone, for merging, pruning, unlearning or Laplace."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ewc._ewc import EWC
from ewc._options import FisherType, Reduction
from ewc.data.calling import Forward
from ewc.likelihoods import Likelihood

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    likelihood: Likelihood,
    *,
    parameters: Iterable[str | tuple[str, nn.Parameter]] | None = None,
    forward: Forward | None = None,
    fisher_type: FisherType = "empirical",
    reduction: Reduction = "mean",
    max_samples: int | None = None,
    dataset_size: int | None = None,
    generator: torch.Generator | None = None,
    process_group: "ProcessGroup | None" = None,
) -> dict[str, Tensor]:
    """The diagonal Fisher information of a model: what one consolidation of an `EWC` would hold.

    The mean over samples of the squared gradient of the sample's negative log-likelihood, at the
    model's present parameters, with the checks of `EWC` and without an object. The model is as
    before, also on failure. In distributed training all processes must call this, each with its own
    share of the data.

    Args:
        model: As for `EWC`.
        batches: As for `EWC.consolidate`.
        likelihood: As for `EWC`.
        parameters: As for `EWC`.
        forward: As for `EWC`.
        fisher_type: As for `EWC`.
        reduction: As for `EWC`.
        max_samples: As for `EWC`.
        dataset_size: As for `EWC.consolidate`.
        generator: As for `EWC.consolidate`.
        process_group: As for `EWC`.

    Returns:
        For each parameter, by canonical name, a tensor of its shape: real, `>= 0`, in at least
        float32, on its device, and sharded as it is.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument, the data or the likelihood is invalid, or every entry is zero.
        RuntimeError: It has failed on another process.

    Warns:
        ZeroFisherWarning: The Fisher of some parameters is zero in every entry.
        SlowPathWarning: Most samples were run one at a time.

    Example:
        >>> fisher = diagonal_fisher(model, tasks[0], Classification())
        >>> fisher["weight"].shape == model.weight.shape
        True
    """
    ewc = EWC(
        model,
        likelihood,
        parameters=parameters,
        forward=forward,
        fisher_type=fisher_type,
        reduction=reduction,
        max_samples=max_samples,
        process_group=process_group,
    )
    ewc.consolidate(batches, dataset_size=dataset_size, generator=generator)
    # Not copied, as by the property `fisher`: the object is gone in a moment.
    return {name: quadratic.fisher for name, quadratic in ewc._state.quadratics.items()}
