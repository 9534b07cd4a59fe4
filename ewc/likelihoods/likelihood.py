"""The base class of likelihoods: what a subclass defines, and what the Fisher information needs."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ewc._options import FisherType
from ewc.data.advice import accepts


class Likelihood(ABC):
    """The base class of likelihoods. A subclass must define `nll`.

    `fisher_type="mc"` also needs `sample`, and `"exact"` needs `exact_terms`; without them, these
    types are an error. All three methods are called on batches of one sample, often inside
    `torch.func.vmap`. So they must not call `.item()`, and must not have shapes that depend on
    values.

    If the three methods treat the samples of a batch independently, a subclass can declare it:
    `class Poisson(Likelihood, takes_batches=True)`. The methods are then called on whole batches
    outside vmap, which is faster. Subclasses of it do not inherit the declaration.

    Example:
        >>> class Poisson(Likelihood):
        ...     def nll(self, outputs, targets):
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
    _takes_batches: ClassVar[bool] = False
    _needed: ClassVar[dict[FisherType, str]] = {
        "exact": "exact_terms(outputs, *rest) -> [K, N]",
        "mc": "sample(outputs) -> targets",
    }

    def __init_subclass__(cls, *, takes_batches: bool = False) -> None:
        super().__init_subclass__()
        cls._takes_batches = takes_batches

    @property
    def takes_batches(self) -> bool:
        """Whether the samples of any batch are known to be independent.

        If so, the methods need not be called on single samples inside vmap, where every operation
        costs more.
        """
        return self._takes_batches

    @property
    def function(self) -> Callable[..., Tensor]:
        """The `nll` that a user has written, with its arguments."""
        return self.nll

    @property
    def needs_targets(self) -> bool:
        """Whether `nll` must be called with more than the outputs."""
        return not accepts(self.function, None)

    # Type checkers let a subclass narrow exactly (*args: Any, **kwargs: Any) to arguments of its
    # own, such as (outputs: Tensor, targets: Tensor).
    @abstractmethod
    def nll(self, *args: Any, **kwargs: Any) -> Tensor:
        """`nll(outputs, *rest) -> [N]`: the negative log-likelihood of each sample, in nats.

        `outputs` is the output of the model for a batch of any number N of samples. `rest` is
        everything that follows the inputs in the batch: targets, then masks, ids, lengths. All are
        passed by position. A subclass may name and type its arguments.

        Returns:
            `[N]`, never reduced over samples, differentiable with respect to the outputs.
        """

    def sample(self, outputs: Any, /) -> Any:
        """Draw targets from the distribution that the outputs describe, with the global RNG.

        Returns:
            Targets of the N samples, as `nll` takes them.

        Raises:
            NotImplementedError: The subclass does not define it.
        """
        raise NotImplementedError(self._undefined("mc"))

    def sampled_nll(self, outputs: Any, /, *rest: Any) -> Tensor:
        """The NLL `[N]` of targets drawn by `sample`, which replace `rest[0]`."""
        with torch.no_grad():  # a draw is data, also where it was reparameterised
            targets = self.sample(outputs)
        return self.nll(outputs, targets, *rest[1:])

    def exact_terms(self, *args: Any, **kwargs: Any) -> Tensor:
        """`exact_terms(outputs, *rest) -> [K, N]`: K terms for each sample.

        The squared gradients of a sample's terms, summed over the terms, are its exact Fisher
        information. The arguments are those of `nll`; targets may be absent.

        Returns:
            `[K, N]`, differentiable with respect to the outputs.

        Raises:
            NotImplementedError: The subclass does not define it.
        """
        raise NotImplementedError(self._undefined("exact"))

    def supports(self, fisher_type: FisherType) -> bool:
        """Whether the methods that `fisher_type` needs are defined.

        Raises:
            ValueError: There is no such type.
        """
        if fisher_type == "empirical":
            return True
        if fisher_type == "mc":
            return redefines(self, Likelihood, "sample", "sampled_nll")
        if fisher_type == "exact":
            return redefines(self, Likelihood, "exact_terms")
        raise ValueError(
            f'fisher_type must be "empirical", "exact" or "mc"; found {fisher_type!r}.'
        )

    def _undefined(self, fisher_type: FisherType) -> str:
        """The message of an error: which method this class must define for `fisher_type`."""
        return (
            f"{type(self).__name__} must define {self._needed[fisher_type]} for fisher_type="
            f'"{fisher_type}"; found no definition. Fix: define it, or choose '
            'fisher_type="empirical".'
        )


def redefines(likelihood: Likelihood, base: type, *methods: str) -> bool:
    """Whether the class of a likelihood has another definition of any of these methods."""
    return any(getattr(type(likelihood), name) is not getattr(base, name) for name in methods)


def check_likelihood(likelihood: Likelihood, fisher_type: FisherType) -> None:
    """Refuse what is no likelihood, or does not support `fisher_type`.

    Raises:
        TypeError: It is not a `Likelihood`.
        ValueError: It does not define the method that `fisher_type` needs.
    """
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"likelihood must be a Likelihood, such as Classification(); found {likelihood!r}. "
            "Fix: for a function, use Custom(nll)."
        )
    if not likelihood.supports(fisher_type):
        raise ValueError(likelihood._undefined(fisher_type))
