"""The base class of likelihoods: what a user writes, and what the Fisher information asks for."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ewc._options import FisherType


class Likelihood(ABC):
    """The base class of likelihoods; one obligation: `nll`.

    Define `sample` to make `fisher_type="mc"` possible, and `exact_terms` for `"exact"`; without
    them, these types are an error. The model runs on single samples, so all three are called with
    batches of one, often inside `torch.func.vmap`: no `.item()`, no shapes that depend on values.

    Example:
        >>> class Poisson(Likelihood):
        ...     def nll(self, outputs, targets, *rest):
        ...         return F.poisson_nll_loss(outputs, targets, reduction="none").sum(1)
        ...
        ...     def sample(self, outputs):
        ...         return torch.poisson(outputs.exp())
        >>> Poisson().nll(torch.zeros(2, 3), torch.ones(2, 3))
        tensor([3., 3.])

    Attributes:
        batch_dim: The dimension that holds the samples, in inputs, targets and extras of two
            dimensions or more; 1-D tensors always hold them along dimension 0.
    """

    batch_dim: int = 0

    @property
    def takes_batches(self) -> bool:
        """Whether it is known to treat the samples of any batch apart.

        Then it need not see them one by one inside `vmap`, where every operation costs more.
        """
        return False

    @abstractmethod
    def nll(self, outputs: Any, *rest: Any) -> Tensor:
        """The negative log-likelihood of each sample, in nats, never reduced over samples.

        Args:
            outputs: What the model returned for a batch of N samples; N is any number.
            *rest: What follows the inputs in the batch: targets, then masks, ids, lengths.

        Returns:
            `[N]`, differentiable with respect to the outputs.
        """

    def sample(self, outputs: Any) -> Any:
        """Draw targets from the distribution that the outputs describe, by the global RNG.

        Returns:
            Targets of the N samples, as `nll` takes them.
        """
        raise NotImplementedError(
            f'fisher_type="mc" needs {type(self).__name__} to define sample(outputs) -> targets, '
            'which it does not. Mend: define it, or take fisher_type="empirical".'
        )

    def sampled_nll(self, outputs: Any, *rest: Any) -> Tensor:
        """The NLL `[N]` of targets drawn by `sample`, which take the place of `rest[0]`."""
        with torch.no_grad():  # a draw is data, also where it was reparameterised
            targets = self.sample(outputs)
        return self.nll(outputs, targets, *rest[1:])

    def exact_terms(self, outputs: Any, *rest: Any) -> Tensor:
        """Terms whose squared gradients, summed over terms, are the exact Fisher information.

        Returns:
            `[K, N]`: K terms for each sample, differentiable with respect to the outputs.
        """
        raise NotImplementedError(
            f'fisher_type="exact" needs {type(self).__name__} to define exact_terms(outputs, '
            "*rest) -> [K, N], which it does not. Mend: define it, or take "
            'fisher_type="empirical".'
        )

    def supports(self, fisher_type: FisherType) -> bool:
        """Whether what `fisher_type` needs is defined.

        Raises:
            ValueError: There is no such type.
        """
        own, base = type(self), Likelihood
        if fisher_type == "empirical":
            return True
        if fisher_type == "mc":
            return own.sample is not base.sample or own.sampled_nll is not base.sampled_nll
        if fisher_type == "exact":
            return own.exact_terms is not base.exact_terms
        raise ValueError(
            f'fisher_type must be "empirical", "exact" or "mc"; found {fisher_type!r}.'
        )
