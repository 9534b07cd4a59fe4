"""On another device than the CPU the penalty is the same, and hardly anything is read back.

The device is made up (`tests/support/device.py`).
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch import Tensor, nn

from ewc.fisher.comparison import differing, largest
from ewc.quadratic import kernels
from ewc.quadratic.merging import Merging
from ewc.quadratic.penalty import Penalty
from tests.support import device

SHAPES = [(30, 40), (7,), (), (50, 30), (3, 0), (40,), (70, 80)]
LIMITS = {
    "lists": kernels.Limits(small=0, listed=2000, block=2000),
    "all": kernels.Limits(small=10, listed=2000, block=3000),
}


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process that knows the device: it stays known, and this one is for the other tests."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=device.register) as pool:
        yield pool


def evaluate(
    where: str, dtype: torch.dtype, limits: kernels.Limits
) -> tuple[Tensor, list[Tensor], list[device.Event]]:
    """The value, the gradients of a multiple of it, and what happened, in this process."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    values, anchors, precisions = (
        [torch.randn(shape, generator=generator, dtype=wide) for shape in SHAPES] for _ in range(3)
    )
    kernels.ACCELERATOR = limits
    with device.Device() as made_up:
        thetas = [nn.Parameter(each.to(where, dtype)) for each in values]
        penalty = Penalty(
            thetas,
            [each.abs().to(where) for each in precisions],
            [each.to(where) for each in anchors],
            0.5,
        )
        made_up.events.clear()
        value = penalty(thetas, 2.5)
        gradients = torch.autograd.grad(3 * value, thetas)
        events = made_up.events.copy()
        assert {each.device.type for each in (value, *gradients)} == {where}
        return value.detach().cpu(), [each.cpu() for each in gradients], events


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
def test_the_penalty_stays_on_the_device(
    process: ProcessPoolExecutor, dtype: torch.dtype, limits: kernels.Limits
) -> None:
    value, gradients, events = process.submit(evaluate, device.NAME, dtype, limits).result()
    expected, right, _ = evaluate("cpu", dtype, kernels.ACCELERATOR)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, right)
    assert events == []


def merge(where: str) -> tuple[float, list[device.Event]]:
    """The sum of the constants of eight parameters after three tasks, and what happened."""
    with device.Device() as made_up:
        model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])
        if where != "cpu":
            device.move(model)
        parameters = dict(model.named_parameters())
        made_up.events.clear()
        quadratics = {}
        for task in range(3):
            fisher = {name: torch.ones_like(each) for name, each in parameters.items()}
            quadratics = Merging().next_quadratics(model, quadratics, parameters, fisher)
            with torch.no_grad():
                for each in parameters.values():
                    each.add_(task + 1)
        return sum(each.constant for each in quadratics.values()), made_up.events


def test_what_a_task_adds_to_the_constants_is_read_once(process: ProcessPoolExecutor) -> None:
    constant, events = process.submit(merge, device.NAME).result()
    assert constant == pytest.approx(48 * (1 / 2 + 2 / 3 * 2.5**2))
    assert [event.kind for event in events] == ["read"] * 2  # there is none for the first task


def compare(where: str) -> tuple[list[float], set[str], list[device.Event]]:
    """A comparison of sums of which one is wrong and one is empty."""
    with device.Device() as made_up:
        expected = {f"{n}": torch.full((3,), n / 4, device=where) for n in range(1, 6)}
        expected["empty"] = torch.zeros(0, 2, device=where)
        found = {name: each * (1.2 if name == "4" else 1.01) for name, each in expected.items()}
        made_up.events.clear()
        scales = largest(expected)
        return scales, differing(found, expected, scales, is_half=False), made_up.events


def test_sums_are_compared_with_two_reads(process: ProcessPoolExecutor) -> None:
    scales, names, events = process.submit(compare, device.NAME).result()
    assert scales == [0.25, 0.5, 0.75, 1.0, 1.25, 0.0]
    assert names == {"4"}
    assert [event.kind for event in events] == ["read"] * 2
