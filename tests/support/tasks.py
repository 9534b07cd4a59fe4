"""A small model, small tasks, and the penalty written out: what the tests of the object share."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ewc import EWC, Classification

INPUTS, CLASSES = 5, 3


def make_model(seed: int = 0, **factory: object) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(INPUTS, 7, **factory), nn.Tanh(), nn.Linear(7, CLASSES, **factory)
    )


def make_task(seed: int = 0, batches: int = 2, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, INPUTS, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


def make_ewc(model: nn.Module | None = None, **options: object) -> tuple[nn.Module, EWC]:
    model = make_model() if model is None else model
    return model, EWC(model, Classification(), **options)


def make(
    kind: type[EWC], model: nn.Module | None = None, n_tasks: int = 1, **options: object
) -> tuple[nn.Module, EWC]:
    """A model and an object of this kind that has consolidated; then the model has moved on."""
    model = make_model() if model is None else model
    ewc = kind(model, Classification(), **options)
    for seed in range(n_tasks):
        ewc.consolidate(make_task(seed))
        shift(model, seed)
    return model, ewc


def shift(model: nn.Module, seed: int = 0, by: float = 0.1) -> None:
    """Move every parameter, in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((by * step).to(parameter))


def written_out(
    tasks: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
    model: nn.Module,
    strength: float,
) -> Tensor:
    """The sum over tasks `(fisher, anchor)`, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    parameters = dict(model.named_parameters())
    for fisher, anchor in tasks:
        for name in fisher:
            distance = parameters[name].to(torch.float64) - anchor[name].double()
            total = total + (fisher[name].double() * distance**2).sum()
    return 0.5 * strength * total


def as_task(ewc: EWC) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """What an object knows, as one task for `written_out`."""
    return ewc.fisher, ewc.anchor


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def same_state(ewc: EWC, fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> bool:
    return same(ewc.fisher, fisher) and same(ewc.anchor, anchor)


def grow(model: nn.Module, rows: int = 2) -> None:
    """Give the head more outputs."""
    old = model[2]
    new = nn.Linear(old.in_features, old.out_features + rows)
    with torch.no_grad():
        new.weight[: old.out_features] = old.weight
        new.bias[: old.out_features] = old.bias
    model[2] = new
