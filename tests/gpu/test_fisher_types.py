"""Exact and drawn targets on the device."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ewc import EWC, Classification, Regression
from tests import oracle
from tests.architectures import CASES, build
from tests.gpu.support import DEVICE, assert_near, move, needs_gpu, on_device, tf32

pytestmark = [*needs_gpu, pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning")]
MODELS = ["mlp", "residual group norm", "lstm", "attention", "tied"]


def fisher_of(model: nn.Module, x: Tensor, y: Tensor, fisher_type: str, **options: object) -> dict:
    ewc = EWC(model, Classification(), strength=1.0, fisher_type=fisher_type)
    ewc.consolidate([(x, y)], **options)
    return ewc.fisher


def exact(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The expectation over the classes, by the oracle: sqrt(p) times the gradient of each."""
    model = copy.deepcopy(model).cpu().double()
    x = x.cpu().double() if x.is_floating_point() else x.cpu()

    def terms(model: nn.Module, n: int) -> Tensor:
        logs = model(x[n : n + 1]).log_softmax(1)[0]
        return (0.5 * logs).exp().detach() * logs

    sums = oracle.squares(model, terms, len(x))
    return {name: each / len(x) for name, each in sums.items()}


@pytest.mark.parametrize("name", MODELS)
def test_exact(name: str) -> None:
    model, inputs, targets = build(CASES[name], 6, torch.float32)
    move(model)
    x, y = on_device((inputs, targets))
    assert_near(fisher_of(model, x, y, "exact"), exact(model, x), 1e-4)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        rounded = fisher_of(model, x, y, "exact")
    assert_near(rounded, exact(model, x), 0.15)


@pytest.mark.parametrize("name", MODELS)
def test_drawn(name: str) -> None:
    model, inputs, targets = build(CASES[name], 4, torch.float32)
    move(model)
    x, y = on_device((inputs, targets))
    many = [each.repeat(2000, *[1] * (each.dim() - 1)) for each in (x, y)]
    state = torch.get_rng_state()
    generators = [torch.Generator(DEVICE).manual_seed(1) for _ in range(2)]
    first, second = (fisher_of(model, *many, "mc", generator=each) for each in generators)
    assert torch.equal(torch.get_rng_state(), state)
    # 2,000 draws of each sample: a standard deviation of a few per cent.
    assert_near(first, exact(model, x), 0.1)
    # Additions in another order, from one run to the next.
    assert_near(second, first, 1e-5)


def test_regression_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
    move(model)
    x = torch.randn(12, 6, device=DEVICE)
    ewc = EWC(model, Regression(variance=0.5), strength=1.0, fisher_type="exact")
    with tf32():
        ewc.consolidate([x])
    wide = copy.deepcopy(model).cpu().double()
    sums = oracle.squares(wide, lambda m, n: m(x[n : n + 1].cpu().double())[0] / 0.5**0.5, 12)
    assert_near(ewc.fisher, {name: each / 12 for name, each in sums.items()}, 1e-2)
