"""How the time grows with the number of tensors that a model's parameters are.

Large mixtures of experts and lists of parameters have thousands. Everything takes turns, at every
size, in one interleaved run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import _harness
import torch
import torch.nn.functional as F
from _harness import interleave, number, table
from torch import Tensor, nn

from ewc import EWC, Classification

SIZES = (2000, 4000, 8000)


class Experts(nn.Module):
    """A sum of small layers, two tensors each."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(tensors // 2))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the shape of `x`."""
        total = torch.zeros_like(x)
        for layer in self.layers:
            total = total + layer(x)
        return total


def report(arguments: argparse.Namespace) -> str:
    """The table, as Markdown."""
    sizes = (20, 40) if arguments.quick else SIZES
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for size in sizes:
        for name, call in _calls(size).items():
            calls[name, size] = call
    timings = interleave(calls, arguments.rounds)
    names = list(dict.fromkeys(name for name, _ in calls))
    rows = [
        [
            name,
            *(number(1e3 * timings.median((name, size))) for size in sizes),
            number(timings.ratio((name, sizes[-1]), (name, sizes[0]))),
        ]
        for name in names
    ]
    head = ["ms, by the number of tensors", *(f"{size:,}" for size in sizes), "last / first"]
    return (
        f"{table(head, rows)}\n\n{_harness.machine()}. Medians of {arguments.rounds} interleaved "
        "rounds; ratios within a round."
    )


def _calls(size: int) -> dict[str, Callable[[], object]]:
    """What is timed for a model of `size` tensors."""
    torch.manual_seed(0)
    model = Experts(size).eval()
    batch = torch.randn(8, 4), torch.randint(4, (8,))
    ewc = EWC(model, Classification())
    ewc.consolidate([batch])
    again = EWC(model, Classification())
    state = ewc.state_dict()
    again.load_state_dict(state)
    parameters = list(model.parameters())

    def ordinary() -> object:
        return torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), parameters)

    def load_and_first_penalty() -> object:
        again.load_state_dict(state)
        return again()

    return {
        "forward + backward": ordinary,
        "`consolidate`": lambda: ewc.consolidate([batch]),
        "`state_dict`": ewc.state_dict,
        "`load_state_dict` and the first penalty": load_and_first_penalty,
        "penalty and gradient": lambda: torch.autograd.grad(ewc(), parameters),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    _harness.main("parameters", report, description=__doc__.splitlines()[0], argv=argv)


if __name__ == "__main__":
    main()
