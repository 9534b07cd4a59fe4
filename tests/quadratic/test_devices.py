"""On another device than the CPU the penalty is the same, and nothing is read back.

The device is made up (`tests/support/device.py`).
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch import Tensor, nn

from ewc.quadratic import kernels
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
