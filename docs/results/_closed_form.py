"""Tasks whose losses are quadratic, with a Fisher that is diagonal: everything is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ewc import EWC, OnlineEWC, Regression

WAYS = {"separate": EWC, "online": OnlineEWC}


class Diagonal(nn.Module):
    """Outputs x * theta, a weight for each: the Fisher is diagonal, and it is the Hessian."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(entries, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """`x` is [samples, entries]."""
        return x * self.theta


def distances(seed: int, count: int, entries: int = 50, samples: int = 40) -> dict[str, Any]:
    """How far both ways end from the minimiser of the losses of all tasks together.

    Each task is learned to its end, which takes one Newton step.

    Args:
        seed: Of the tasks.
        count: How many.
        entries: Of theta.
        samples: Of each task.

    Returns:
        By way, the relative distance after 1, 2, ... tasks.
    """
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(count):
        scale = torch.rand(entries, generator=generator, dtype=torch.float64)
        x = scale * torch.randn(samples, entries, generator=generator, dtype=torch.float64)
        truth = torch.randn(entries, generator=generator, dtype=torch.float64)
        tasks.append((x, x * truth))
    return {name: _distances(kind, tasks, entries) for name, kind in WAYS.items()}


def _distances(kind: type[EWC], tasks: list[tuple[Tensor, Tensor]], entries: int) -> list[float]:
    model = Diagonal(entries)
    regularizer = kind(model, Regression(), strength=1.0, fisher_type="exact")
    curvature, moment = torch.zeros(2, entries, dtype=torch.float64)
    found = []
    for x, y in tasks:
        loss = 0.5 * (model(x) - y).square().sum(1).mean() + regularizer()
        (slope,) = torch.autograd.grad(loss, model.theta)
        pull = regularizer.fisher.get("theta", torch.zeros_like(slope))
        with torch.no_grad():
            model.theta -= slope / (x.square().mean(0) + pull)
        regularizer.consolidate([(x, y)])
        curvature, moment = curvature + x.square().mean(0), moment + (x * y).mean(0)
        joint = moment / curvature
        found.append(float((model.theta.detach() - joint).norm() / joint.norm()))
    return found
