"""The penalty and its gradient, beside plain autograd, an AdamW step and the memory limit.

The memory limit is one fused operation, `torch.addcmul(a, b, c, out=d)`, on as many entries as the
model has: it reads three arrays and writes one, which is the least that a gradient
`precision * (theta - anchor)` must do. Value and gradient are compared with the plain version
before anything is timed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import _harness
import torch
from _harness import ALONE, Timings, autograd_alone, interleave, number, table
from _replay import replay
from torch import Tensor, nn

from ewc import EWC, Custom

LIMIT = "memory limit: read three arrays, write one"
ADAMW = "AdamW step, default"
OPERATIONS = "its operations alone"
STRENGTH = 100.0
DISTINCT = 10
"""Different tasks; a longer sequence goes through them again."""


@dataclass(frozen=True)
class Layout:
    """A number of parameters of one shape."""

    name: str
    tensors: int
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """All together."""
        return self.tensors * math.prod(self.shape)


LAYOUTS = [
    Layout("Few large tensors", 10, (1000, 1000)),
    Layout("Many small tensors", 1000, (1000,)),
]
QUICK = [
    Layout("Few large tensors", 4, (500, 500)),
    Layout("Many small tensors", 200, (500,)),
]


class Tensors(nn.Module):
    """Parameters of one layout, and a function of them."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(
            [nn.Parameter(torch.empty(layout.shape)) for _ in range(layout.tensors)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[N]`: each input times something that depends on every entry."""
        return x * torch.stack([each.square().sum() for each in self.tensors]).sum().sqrt()


class Tasks:
    """A model, and what it learned from a few tasks, of one sample each."""

    def __init__(self, layout: Layout) -> None:
        self.model = Tensors(layout)
        self.parameters = list(self.model.parameters())
        self.terms: list[tuple[list[Tensor], list[Tensor]]] = []
        for task in range(DISTINCT):
            self._solve(task)
            loss = self.model(_sample(task)).sum()
            squares = [each.square() for each in torch.autograd.grad(loss, self.parameters)]
            self.terms.append((squares, [each.detach().clone() for each in self.parameters]))

    def protected(self, counts: Sequence[int]) -> dict[int, EWC]:
        """For each number of tasks, an `EWC` that has so many."""
        found = {}
        growing = self._ewc()
        for task in range(min(DISTINCT, max(counts))):
            self._solve(task)
            growing.consolidate([(_sample(task), torch.zeros(1))])
            if task + 1 in counts:
                found[task + 1] = self._ewc()
                found[task + 1].load_state_dict(growing.state_dict())
        for count in sorted(set(counts) - set(found)):
            # Going through the same tasks again adds the same quadratic again.
            state = growing.state_dict()
            times, rest = divmod(count, DISTINCT)
            if rest:
                raise ValueError(f"Beyond {DISTINCT}, tasks go by {DISTINCT}; found {count}.")
            for part in ("fisher", "constant"):
                state[part] = {name: times * value for name, value in state[part].items()}
            found[count] = self._ewc()
            found[count].load_state_dict({**state, "n_tasks": count})
        self._solve(DISTINCT)  # somewhere that no task has been
        return found

    def plain(self, count: int) -> Tensor:
        """What one would write: a sum over tasks and parameters."""
        total = torch.zeros(())
        for task in range(count):
            fishers, anchors = self.terms[task % DISTINCT]
            for parameter, fisher, anchor in zip(self.parameters, fishers, anchors, strict=True):
                total = total + (fisher * (parameter - anchor) ** 2).sum()
        return STRENGTH / 2 * total

    def _ewc(self) -> EWC:
        return EWC(self.model, Custom(lambda outputs, _: outputs), strength=STRENGTH)

    def _solve(self, task: int) -> None:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(task)
            for parameter in self.parameters:
                parameter.normal_()


def _sample(task: int) -> Tensor:
    return torch.full((1,), 1.0 + task)


def measure(layout: Layout, counts: Sequence[int], rounds: int) -> Timings[str]:
    """Check, then time everything on one layout."""
    tasks = Tasks(layout)
    parameters = tasks.parameters
    calls: dict[str, Callable[[], object]] = {}
    first, second, third, out = torch.rand(4, layout.entries).unbind(0)
    calls[LIMIT] = lambda: torch.addcmul(first, second, third, out=out)
    size = layout.entries // layout.tensors
    pieces = [each.split(size) for each in (first, second, third)]
    calls["the same, into newly allocated memory"] = lambda: [
        torch.addcmul(*piece) for piece in zip(*pieces, strict=True)
    ]
    calls[ALONE] = partial(_value_and_gradient, partial(autograd_alone, parameters), parameters)
    for count, ewc in tasks.protected(counts).items():
        check(ewc(), tasks.plain(count), parameters)
        run = partial(_value_and_gradient, ewc, parameters)
        calls[_title("**ewc**", count)] = run
        if count == counts[0]:
            calls[OPERATIONS] = replay(run)
            point = partial(ewc, dict(tasks.model.named_parameters()))
            calls[f"{_title('**ewc**', count)}, `at=` a point"] = partial(
                _value_and_gradient, point, parameters
            )
    for count in counts:
        plain = partial(tasks.plain, count)
        calls[_title("plain autograd", count)] = partial(_value_and_gradient, plain, parameters)
    for title, options in ((ADAMW, {}), ("AdamW step, foreach", {"foreach": True})):
        calls[title] = adamw(layout, options)
    if _fused_is_there():
        calls["AdamW step, fused"] = adamw(layout, {"fused": True})
    return interleave(calls, rounds)


def _value_and_gradient(penalty: Callable[[], Tensor], parameters: list[nn.Parameter]) -> object:
    return torch.autograd.grad(penalty(), parameters)


def check(found: Tensor, expected: Tensor, parameters: list[nn.Parameter]) -> None:
    """Compare values and gradients."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    pairs = zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    )
    for one, other in pairs:
        error = float((one - other).norm() / other.norm())
        if not error < 1e-3:
            raise AssertionError(f"The gradients differ by {error:.2g}, relative.")


def adamw(layout: Layout, options: dict[str, bool]) -> Callable[[], object]:
    """A step of AdamW on parameters of their own, with gradients in place."""
    parameters = [nn.Parameter(torch.randn(layout.shape)) for _ in range(layout.tensors)]
    for parameter in parameters:
        parameter.grad = torch.randn(layout.shape)
    return torch.optim.AdamW(parameters, lr=1e-6, **options).step


def _fused_is_there() -> bool:
    try:
        torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
    except RuntimeError:
        return False
    return True


def _title(what: str, count: int) -> str:
    return f"{what}, {count} task" + ("s" if count > 1 else "")


def report(arguments: argparse.Namespace) -> str:
    """A table for each layout, as Markdown."""
    keeps = not arguments.default_allocator and _harness.keep_freed_memory()
    parts = []
    for layout in QUICK if arguments.quick else LAYOUTS:
        timings = measure(layout, arguments.tasks, arguments.rounds)
        rows = [
            [
                name,
                number(1e3 * timings.median(name)),
                number(timings.ratio(name, LIMIT)),
                number(timings.ratio(name, ADAMW)),
            ]
            for name in timings.seconds
        ]
        rate = 4 * 4 * layout.entries / timings.median(LIMIT) / 1e9
        parts += [
            f"**{layout.name}:** {layout.tensors:,} of shape {list(layout.shape)}, "
            f"{layout.entries / 1e6:g} million entries in float32. The memory limit is "
            f"{number(rate)} GB/s; the middle half of the rounds is at most "
            f"{100 * timings.spread(LIMIT):.0f} % wide.",
            table(["value and gradient", "ms", "memory limit = 1", "AdamW step = 1"], rows),
        ]
    parts.append(
        f"{_harness.machine()}. Medians of the ratios of {arguments.rounds} interleaved rounds. "
        + f"The allocator {'keeps' if keeps else 'may return'} memory that is freed."
    )
    return "\n\n".join(parts)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument(
        "--default-allocator", action="store_true", help="it may return memory to the kernel"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    _harness.main(
        "penalty", report, description=__doc__.splitlines()[0], options=_options, argv=argv
    )


if __name__ == "__main__":
    main()
