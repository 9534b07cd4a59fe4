"""A user's script with every public name, for the type checkers.

mypy and pyright, both in their strict modes, must accept it as it is, without a comment that
silences them. It also runs.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader, TensorDataset

import ewc.fisher
from ewc import (
    EWC,
    Bernoulli,
    Classification,
    Curvature,
    Custom,
    FisherType,
    InvalidBatch,
    Likelihood,
    Method,
    NothingProtectedWarning,
    OnlineEWC,
    Pointwise,
    Reduction,
    Regression,
    ReplacedParameterWarning,
    SlowPathWarning,
    Summary,
    TimeSeries,
    ZeroFisherWarning,
    context_mod_forward,
    diagonal_fisher,
)
from ewc.likelihoods import Fault, Targets
from ewc.plot import plot_fisher


class Poisson(Likelihood):
    """Narrows the arguments of every method to its own."""

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.poisson_nll_loss(outputs, targets, reduction="none").sum(1)

    def sample(self, rates: Tensor) -> Tensor:
        return torch.poisson(rates.exp())

    def exact_terms(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        return ((outputs / 2).exp().detach() * outputs).T


class Weighted(Likelihood):
    """Has a default and a tuple of extras."""

    batch_dim = 1

    def nll(self, logits: Tensor, labels: Tensor, weight: float = 1.0, *ids: Tensor) -> Tensor:
        return weight * F.cross_entropy(logits, labels, reduction="none")


class Counts(Pointwise, takes_batches=True):
    """Defines all five methods of a position."""

    def __init__(self, *, largest: float = 1e6) -> None:
        self.largest = largest

    def head(self, outputs: Any) -> Tensor:
        return super().head(outputs)

    def read_targets(self, head: Tensor, targets: Tensor, mask: Tensor | None) -> Targets:
        values, mask, faults = super().read_targets(head, targets, mask)
        return Targets(values, mask, (*faults, Fault(values > self.largest, "too many.")))

    def position_nll(self, rates: Tensor, counts: Tensor) -> Tensor:
        return rates.exp() - counts * rates

    def position_sample(self, rates: Tensor) -> Tensor:
        return torch.poisson(rates.exp())

    def position_terms(self, rates: Tensor) -> Tensor:
        return ((rates / 2).exp().detach() * rates).unsqueeze(0)


class Half(Classification):
    """Changes one method of a built-in likelihood."""

    def position_nll(self, head: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * super().position_nll(head, targets)


def poisson_nll(outputs: Tensor, counts: Tensor) -> Tensor:
    return F.poisson_nll_loss(outputs, counts, reduction="none").sum(1)


def forward(model: nn.Module, batch: Any) -> Tensor:
    outputs: Tensor = model(batch[0])
    return outputs


def likelihoods() -> list[Likelihood]:
    return [
        Classification(),
        Classification([0, 1], target_transform=lambda labels: labels, ignore_index=-1),
        Bernoulli([0, 1], target_transform=lambda labels: labels),
        Regression(0.5, allowed_outputs=range(2)),
        Regression(torch.ones(3)),
        TimeSeries(),
        TimeSeries(Counts(), batch_first=True),
        Custom(poisson_nll, sample=lambda outputs: outputs.exp(), batch_dim=0),
        Poisson(),
        Weighted(),
        Half(),
    ]


def protect(
    model: nn.Module,
    *,
    fisher_type: FisherType = "empirical",
    reduction: Reduction = "mean",
    process_group: ProcessGroup | None = None,
) -> EWC:
    """Passes options on."""
    return EWC(
        model,
        Classification(),
        strength=100.0,
        parameters=[name for name, _ in model.named_parameters()],
        forward=forward,
        fisher_type=fisher_type,
        reduction=reduction,
        max_samples=1000,
        process_group=process_group,
    )


def report(summary: Summary) -> dict[str, str]:
    """Reads every field."""
    totals: tuple[int, int, float, float] = (
        summary.n_tasks,
        summary.samples,
        summary.trace,
        summary.bound,
    )
    parameters: Mapping[str, Curvature] = summary.parameters
    rows = {name: f"{one.entries} {one.mean} {one.largest}" for name, one in parameters.items()}
    method: Method = summary.paths["weight"]
    if method == "loop":
        rows["weight"] = summary.reasons["weight"]
    return {**rows, "totals": str(totals), "table": summary.table(rows=5)}


def main() -> None:
    warnings.simplefilter("error", SlowPathWarning)
    warnings.simplefilter("ignore", ZeroFisherWarning)
    warnings.simplefilter("error", NothingProtectedWarning)
    warnings.simplefilter("error", ReplacedParameterWarning)
    model = nn.Linear(4, 5)
    data = TensorDataset(torch.randn(20, 4), torch.randint(5, (20,)))
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(data, batch_size=5)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01)  # PyTorch leaves `step` untyped

    ewc_ = protect(model, fisher_type="mc", reduction="sum")
    for x, y in loader:
        loss: Tensor = F.cross_entropy(model(x), y) + ewc_()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    generator = torch.Generator().manual_seed(0)
    report(ewc_.consolidate(loader, dataset_size=20, weight=2.0, generator=generator))
    moved: Tensor = ewc_(at={"bias": torch.zeros(5)})
    alone: dict[str, Tensor] = diagonal_fisher(model, loader, Classification(), max_samples=10)
    assert moved >= 0
    assert alone.keys() == {"weight", "bias"}
    ewc_.strength = 2 * ewc_.strength
    ewc_.strength = "auto"
    fisher: dict[str, Tensor] = ewc_.fisher
    assert fisher.keys() == ewc_.anchor.keys()

    other = protect(model, fisher_type="mc", reduction="sum")
    state: dict[str, Any] = ewc_.state_dict(full=True)
    other.load_state_dict(state)
    other.forget("bias")

    online = OnlineEWC(
        model,
        Custom(poisson_nll),
        fisher_type="empirical",
        decay=0.9,
        prior_precision={"weight": torch.ones(5, 4)},
    )
    summary = online.consolidate(
        [(torch.randn(8, 4), torch.ones(8, 5))],
        likelihood=Regression(),
        forward=context_mod_forward(lambda batch: [torch.ones(5)]) if online.n_tasks else None,
    )
    try:
        online.consolidate([(torch.randn(8, 4), torch.ones(7, 5))])
    except InvalidBatch as error:
        print(summary, error)
    for likelihood in likelihoods():
        if likelihood.supports("exact"):
            print(likelihood, ewc.__version__, ewc.fisher.__name__, plot_fisher.__name__)


if __name__ == "__main__":
    main()
