"""A likelihood made of functions."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import override

from ewc._checks import function, integer
from ewc._options import FisherType
from ewc.likelihoods.likelihood import Likelihood


class Custom(Likelihood):
    """A likelihood defined by functions. It does not support `fisher_type="exact"`.

    Args:
        nll: `nll(outputs, *rest) -> [N]`, the negative log-likelihood of each sample, in nats. It
            must not be reduced over samples.
        sample: `sample(outputs) -> targets`, draws with the global RNG. `fisher_type="mc"` needs
            it.
        batch_dim: The dimension that holds the samples, in tensors of two dimensions or more.

    Raises:
        TypeError: `nll` or `sample` is not a function, or `batch_dim` is not an integer.
        ValueError: `batch_dim` is negative.

    Example:
        >>> def nll(outputs, counts):
        ...     return F.poisson_nll_loss(outputs, counts, reduction="none").sum(1)
        >>> poisson = Custom(nll, sample=lambda outputs: torch.poisson(outputs.exp()))
        >>> poisson.nll(torch.zeros(2, 3), torch.ones(2, 3))
        tensor([3., 3.])
    """

    def __init__(
        self,
        nll: Callable[..., Tensor],
        *,
        sample: Callable[[Any], Any] | None = None,
        batch_dim: int = 0,
    ) -> None:
        self._nll = function("nll", nll)
        self._sample = None if sample is None else function("sample", sample)
        self.batch_dim = integer("batch_dim", batch_dim)
        if batch_dim < 0:
            raise ValueError(f"batch_dim must be >= 0; found {batch_dim}.")

    def __repr__(self) -> str:
        return f"Custom({self._nll!r}, sample={self._sample!r}, batch_dim={self.batch_dim})"

    @property
    @override
    def function(self) -> Callable[..., Tensor]:
        return self._nll

    @override
    def nll(self, outputs: Any, *rest: Any) -> Tensor:
        return self._nll(outputs, *rest)

    @override
    def sample(self, outputs: Any, /) -> Any:
        if self._sample is None:
            raise NotImplementedError(
                'Custom must have a function sample for fisher_type="mc"; found None. Fix: '
                'Custom(nll, sample=...), or choose fisher_type="empirical".'
            )
        return self._sample(outputs)

    @override
    def supports(self, fisher_type: FisherType) -> bool:
        if fisher_type == "mc" and self._sample is None:
            return False
        return super().supports(fisher_type)
