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
    """Estimate the diagonal Fisher information of a model, without an `EWC` object.

    The result is the mean over samples of the squared gradient of the sample's negative
    log-likelihood, in nats, at the current parameters: the Fisher information of one consolidation
    of `EWC`. The model is as before the call, also after an error. In distributed training all
    processes must call this, each with its own share of the data.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017,
    eq. 3.

    Args:
        model: The model, wrapped (DDP, compiled, ...) or not.
        batches: Any iterable of batches, in the forms that `EWC.consolidate` takes.
        likelihood: The distribution of the targets that the outputs describe.
        parameters: Names, or `(name, parameter)` pairs; `None`: every parameter with
            `requires_grad`.
        forward: `forward(model, batch) -> outputs`. `None`: the model is called on the inputs.
        fisher_type: `"empirical"`, `"exact"` or `"mc"`.
        reduction: `"mean"` or `"sum"` over the samples.
        max_samples: The most samples, over all processes together.
        dataset_size: The number of samples of the task, used only by `reduction="sum"`. By default
            the samples seen, or `len(batches.dataset)` if `max_samples` has ended the pass early.
        generator: Draws the targets of `fisher_type="mc"`. By default the global generator.
        process_group: The group over which batches are sharded.

    Returns:
        Tensors of the parameters' shapes, by canonical name. They are real, `>= 0`, in at least
        float32, on the parameters' devices, and sharded as the parameters are.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: An argument, the data or the likelihood is invalid, or every entry is zero.
        RuntimeError: The call failed on another process.

    Warns:
        ZeroFisherWarning: The Fisher of some parameters is zero in every entry.
        SlowPathWarning: More than a few samples of each batch were run one at a time.

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
