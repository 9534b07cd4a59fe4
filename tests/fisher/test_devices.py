"""On another device than the CPU nothing is left on the CPU, and hardly anything is read back.

The device is made up (`tests/support/device.py`). The batches come from a generator, which sees
what happens between one batch and the next.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ewc import EWC, Classification, Likelihood, OnlineEWC, Regression
from tests.architectures import CASES, build
from tests.support import device
from tests.support.asserts import assert_close

BATCHES = 4

FAMILIES = [
    "mlp",
    "conv2d odd",
    "conv transpose 2d",
    "residual group norm",
    "running instance norm",
    "rms norm",
    "prelu",
    "rnn relu bidirectional",
    "gru bidirectional",
    "lstm without bias",
    "gru cell",
    "lstm cell",
    "attention",
    "attention with key bias",
    "embedding with padding",
    "bag max",
    "bilinear",
    "direct",
    "queries",
    "by hand",
    "products",
    "expert weights",
    "overlapping parts",
    "tied",
    "weight norm",
    "own function",
    "complex",
]
"""Models of the zoo: all rules, and what goes by a copy per sample."""

CHECKS = 2
"""What is read for each batch: whether its targets are valid, and whether its sums are finite."""


@dataclass(frozen=True)
class Run:
    """One consolidation.

    Attributes:
        fisher: By name, on the CPU.
        devices: Of the Fisher and the anchor.
        paths: How each parameter went.
        steps: What happened between one batch and the next, without the first two: the first is
            also compared with plain autograd.
        lengths: How many operations there were in each of `steps`.
        steps_of_penalty: What happened in a penalty and its reverse pass.
        gradients: Of the penalty, on the CPU.
    """

    fisher: dict[str, Tensor]
    devices: set[str]
    paths: dict[str, str]
    steps: list[list[device.Event]]
    lengths: list[int]
    steps_of_penalty: list[device.Event]
    gradients: list[Tensor]


def consolidate(
    name: str,
    fisher_type: str,
    likelihood: Likelihood,
    where: str,
    *,
    kind: type[EWC] = EWC,
    data_on: str | None = None,
) -> Run:
    """Run a model of the zoo on the CPU or the device, in this process."""
    model, inputs, targets = build(CASES[name], 2, torch.float64)
    if isinstance(likelihood, Regression):
        targets = torch.nn.functional.one_hot(targets, CASES[name].classes).double()
    made_up = device.Device()
    with nullcontext() if where == "cpu" else made_up:
        if where != "cpu":
            device.move(model)
        data = tree_map_only(Tensor, lambda each: each.to(data_on or where), (inputs, targets))
        made_up.events.clear()
        seen: list[list[device.Event]] = []
        clocks: list[int] = []

        def batches() -> Iterator[Any]:
            for _ in range(BATCHES):
                yield data
                seen.append(made_up.events.copy())
                clocks.append(made_up.clock)
                made_up.events.clear()

        torch.manual_seed(0)
        ewc = kind(model, likelihood, fisher_type=fisher_type)
        summary = ewc.consolidate(batches(), dataset_size=2 * BATCHES)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        made_up.events.clear()
        ewc().backward()
        events = made_up.events.copy()
        known = [*ewc.fisher.values(), *ewc.anchor.values()]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return Run(
            fisher={key: value.cpu() for key, value in ewc.fisher.items()},
            devices={each.device.type for each in [*known, *gradients]},
            paths=dict(summary.paths),
            steps=seen[2:],
            lengths=[after - before for before, after in pairwise(clocks[1:])],
            steps_of_penalty=events,
            gradients=[each.cpu() for each in gradients],
        )


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process that knows the device: it stays known, and this one is for the other tests."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin) as pool:
        yield pool


def _begin() -> None:
    torch.set_num_threads(1)
    device.register()


def check(process: ProcessPoolExecutor, *arguments: Any, **options: Any) -> Run:
    """Runs on the device; the CPU finds the same."""
    there = process.submit(consolidate, *arguments, device.NAME, **options)
    found: Run = there.result()
    options.pop("data_on", None)
    expected = consolidate(*arguments, "cpu", **options)
    assert_close(found.fisher, expected.fisher, 1e-9)
    assert found.paths == expected.paths
    assert found.devices == {device.NAME}
    torch.testing.assert_close(found.gradients, expected.gradients)
    assert len(found.steps) == BATCHES - 2
    return found


def reads(events: list[device.Event]) -> list[str]:
    return [event.operation for event in events if event.kind == "read"]


def others(events: list[device.Event]) -> list[str]:
    return [event.operation for event in events if event.kind != "read"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_stays_on_the_device(process: ProcessPoolExecutor, name: str) -> None:
    found = check(process, name, "empirical", Classification())
    for step in found.steps:
        assert others(step) == []
        assert len(reads(step)) <= CHECKS
    assert found.steps_of_penalty == []


@pytest.mark.parametrize("fisher_type", ["exact", "mc"])
@pytest.mark.parametrize("name", ["mlp", "conv2d odd", "gru cell", "attention", "direct"])
def test_every_fisher_type_stays_on_the_device(
    process: ProcessPoolExecutor, name: str, fisher_type: str
) -> None:
    found = check(process, name, fisher_type, Classification(), kind=OnlineEWC)
    for step in found.steps:
        assert others(step) == []
        assert len(reads(step)) <= CHECKS
    assert found.steps_of_penalty == []


@pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
def test_whether_sums_are_finite_is_read_one_batch_later(
    process: ProcessPoolExecutor, fisher_type: str
) -> None:
    found = check(process, "mlp", fisher_type, Regression(0.5))
    for step, length in zip(found.steps, found.lengths, strict=True):
        ages = [event.age for event in step if event.kind == "read"]
        assert max(ages) >= length > 50


@pytest.mark.parametrize("name", ["mlp", "embedding with padding"])
def test_batches_on_the_cpu_are_moved_once(process: ProcessPoolExecutor, name: str) -> None:
    found = check(process, name, "empirical", Classification(), data_on="cpu")
    for step in found.steps:
        moved = [event.operation for event in step if event.kind == "upload"]
        assert moved == ["aten._to_copy.default"] * 2
        assert len(reads(step)) <= CHECKS


def test_the_outputs_of_a_head_are_moved_without_waiting(process: ProcessPoolExecutor) -> None:
    found = check(process, "mlp", "empirical", Classification(allowed_outputs=[0, 1, 2]))
    for step in found.steps:
        assert {event.kind for event in step} <= {"read", "upload", "cpu"}
        assert len(reads(step)) <= CHECKS


def _split(fisher_type: str, where: str) -> dict[str, Tensor]:
    """The Fisher of a model that begins on `where` and ends on the CPU, where its loss is."""
    torch.manual_seed(0)
    first, last = torch.nn.Linear(5, 4).double(), torch.nn.Linear(4, 3).double()
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))

    class Split(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = first, last

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.to(where)).tanh().cpu())

    with nullcontext() if where == "cpu" else device.Device():
        if where != "cpu":
            device.move(first)
        ewc = EWC(Split(), Classification(), fisher_type=fisher_type)
        ewc.consolidate([(x, y)])
        with torch.no_grad():
            last.weight.add_(1)
        ewc().backward()
        return {name: each.cpu() for name, each in ewc.fisher.items()}


@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
def test_a_model_on_two_devices(process: ProcessPoolExecutor, fisher_type: str) -> None:
    found = process.submit(_split, fisher_type, device.NAME).result()
    torch.testing.assert_close(found, _split(fisher_type, "cpu"))


def test_the_device_knows_what_is_read(process: ProcessPoolExecutor) -> None:
    """What the tests above rely on: a model that reads, and one that is half on the CPU."""
    step = process.submit(consolidate, "branches", "empirical", Classification(), device.NAME)
    assert "aten._local_scalar_dense.default" in reads(step.result().steps[0])
    with pytest.raises(RuntimeError, match="same device"):
        process.submit(_mixed).result()
    events = process.submit(_events).result()
    assert [event.kind for event in events] == ["upload", "cpu", "read", "read", "read", "cpu"]


def _mixed() -> None:
    with device.Device():
        torch.ones(2, device=device.NAME) + torch.ones(2)


def _events() -> list[device.Event]:
    x = torch.arange(3.0)
    with device.Device() as made_up:
        y = x.to(device.NAME)
        x + 1
        bool(y.sum() > 1), y[y > 1], y.cpu() + 1
    return made_up.events
