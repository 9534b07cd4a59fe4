"""Every rule on the device, beside the oracle in float64 on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc import EWC, Classification
from tests.architectures import CASES, build
from tests.gpu.support import (
    DEVICE,
    assert_near,
    expected_sums,
    full_precision,
    move,
    needs_gpu,
    on_device,
    tf32,
)

pytestmark = [
    *needs_gpu,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # Their weights lie side by side only in types that PyTorch lists for cuDNN: not in bfloat16.
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
    pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning", "ignore::ewc.ZeroFisherWarning"),
]


@dataclass(frozen=True)
class Mode:
    """A way to run a model.

    Attributes:
        context: What the caller has switched on.
        tolerance: How far a Fisher may be off, as a share of its norm.
        dtype: Of the parameters.
        same_paths: Whether the methods must be those of the CPU in float64. In half precision the
            two samples that are run first may differ by more than is allowed there.
    """

    context: Callable[[], AbstractContextManager[Any]]
    tolerance: float
    dtype: torch.dtype = torch.float32
    same_paths: bool = True


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16)


MODES = {
    # Rounding of 2^-24 in each of the hundreds of additions behind an entry.
    "float32": Mode(full_precision, 1e-4),
    # The model itself runs with factors of 11 bits: 2^-11 in each layer, doubled by the square.
    "tf32": Mode(tf32, 1e-2),
    # 8 bits: 2^-8 in each operation, a dozen in a row, doubled by the square; and what a model
    # makes of that where it saturates or takes the largest of several values.
    "autocast": Mode(autocast, 0.15, same_paths=False),
    "bfloat16": Mode(nullcontext, 0.15, torch.bfloat16, same_paths=False),
}
REFUSED = {
    ("bfloat16", "complex"): "there are no complex numbers of this precision",
    ("bfloat16", "bag max"): "PyTorch has no reverse pass of it on an accelerator",
    ("bfloat16", "orthogonal"): "the matrix exponential is NaN",
    ("autocast", "experts"): "the model writes one dtype into another",
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_oracle(mode: str, name: str) -> None:
    case, how = CASES[name], MODES[mode]
    if (mode, name) in REFUSED:
        pytest.skip(REFUSED[mode, name])
    model, *batch = build(case, 6, torch.float32)
    move(model, how.dtype)
    inputs, targets = on_device(batch, how.dtype)
    ewc = EWC(model, Classification(), strength=1.0)
    with how.context():
        summary = ewc.consolidate([(inputs, targets)])
    expected = {name: each / 6 for name, each in expected_sums(model, (inputs, targets)).items()}
    assert_near(ewc.fisher, expected, how.tolerance)
    assert all(each.device.type == DEVICE.type for each in ewc.fisher.values())
    for parameter, path in summary.paths.items() if how.same_paths else ():
        wanted = [p for prefix, p in (case.slow or {}).items() if parameter.startswith(prefix)]
        assert wanted[:1] == ["any"] or path == (wanted or ["rule"])[0], parameter


class Recurrent(nn.Module):
    """A recurrent layer wide enough for cuDNN's fast kernels, and a linear layer on its end."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.read = layer, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.layer(x)[0][:, -1])


class Words(nn.Module):
    """A table much larger than what is read from it, tied to the output layer or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(3000, 32)
        self.mix = nn.Linear(32, 32)
        self.read = nn.Linear(32, 3000, bias=False)
        if tied:
            self.read.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.mix(self.table(x.long() % 3000)).tanh().mean(1))


def _flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(5))


LARGE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(700, 900), nn.Tanh(), nn.Linear(900, 5)), (700,)),
    # 36 samples of 900 x 700 in float32 are more than is written out at a time.
    "linear, positions": (lambda: _flat(nn.Linear(700, 900), nn.Tanh()), (9, 700)),
    "convolution": (lambda: _flat(nn.Conv2d(3, 64, 7, 2, 3), nn.Tanh()), (3, 33, 31)),
    "convolution 1 x 1": (lambda: _flat(nn.Conv2d(64, 128, 1), nn.Tanh()), (64, 7, 7)),
    "convolution, channels": (lambda: _flat(nn.Conv2d(96, 128, 3), nn.Tanh()), (96, 9, 8)),
    "convolution, groups": (lambda: _flat(nn.Conv2d(64, 64, 3, groups=64), nn.Tanh()), (64, 9, 8)),
    "transposed": (lambda: _flat(nn.ConvTranspose2d(32, 24, 4, 2, 1), nn.Tanh()), (32, 7, 6)),
    "table": (lambda: Words(tied=False), (17,)),
    "tied table": (lambda: Words(tied=True), (17,)),
    "LSTM": (lambda: Recurrent(nn.LSTM(64, 128, batch_first=True), 128), (12, 64)),
    "GRU": (lambda: Recurrent(nn.GRU(64, 128, batch_first=True), 128), (12, 64)),
    "RNN": (lambda: Recurrent(nn.RNN(64, 128, batch_first=True), 128), (12, 64)),
}


@pytest.mark.parametrize("mode", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("name", LARGE)
def test_sizes_for_which_a_device_is_made(name: str, mode: str) -> None:
    how, (make, shape) = MODES[mode], LARGE[name]
    torch.manual_seed(0)
    model, samples = make().eval(), 7 if "LSTM" in name else 40
    x = torch.randn(samples, *shape)
    if isinstance(model, Words):
        x = (1000 * x).abs()
    classes = model(x[:1]).shape[1]  # for lazy layers
    y = torch.randint(classes, (samples,))
    move(model, how.dtype)
    # The numbers of words are more than half precision can count to.
    x, y = on_device((x, y), None if isinstance(model, Words) else how.dtype)
    ewc = EWC(model, Classification(), strength=1.0)
    with how.context():
        summary = ewc.consolidate([(x, y)])
    assert set(summary.paths.values()) == {"rule"}, summary.reasons
    expected = {name: each / samples for name, each in expected_sums(model, (x, y)).items()}
    assert_near(ewc.fisher, expected, how.tolerance)


def test_small_batches_that_are_run_together() -> None:
    model, inputs, targets = build(CASES["residual batch norm"], 40, torch.float32)
    move(model)
    inputs, targets = on_device((inputs, targets))
    found = []
    parts = list(zip(inputs.split(4), targets.split(4), strict=True))
    for batches in (parts, iter(parts), [(inputs.cpu(), targets.cpu())]):
        ewc = EWC(model, Classification(), strength=1.0)
        assert ewc.consolidate(batches).samples == 40
        found.append(ewc.fisher)
    expected = {name: each / 40 for name, each in expected_sums(model, (inputs, targets)).items()}
    for fisher in found:
        assert_near(fisher, expected, 1e-4)


class OneProduct(nn.Module):
    """A layer, and outputs made of what it gives without another product."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.layer(x).flatten(1).unflatten(1, (4, -1)).sin().mean(2)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(256, 256), (256,)),
    "linear, positions": (lambda: nn.Linear(256, 256), (33, 256)),
    "convolution": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(64, 64, 3, padding=1), (64, 8, 8)),
}


@pytest.fixture
def settings() -> Iterator[None]:
    """What the caller has set is as it was, and can be read the old way and the new."""
    yield
    with tf32():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("name", LAYERS)
def test_products_of_collection_are_not_rounded_to_tf32(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model = OneProduct(make()).eval()
    x, y = torch.randn(8, *shape), torch.randint(4, (8,))
    # Factors of 8 bits: the model's own product loses nothing by TF32. That of collection, whose
    # left factor is a gradient of 24 bits, would be off by about 3e-4.
    for tensor in [x, *model.parameters()]:
        tensor.data = tensor.data.bfloat16().float()
    move(model)
    x, y = on_device((x, y))
    ewc = EWC(model, Classification(), strength=1.0)
    with tf32():
        before = torch.backends.cuda.matmul.fp32_precision
        ewc.consolidate([(x, y)])
        assert torch.backends.cuda.matmul.fp32_precision == before
    expected = {name: each / 8 for name, each in expected_sums(model, (x, y)).items()}
    assert_near(ewc.fisher, expected, 1e-5)


def test_tf32_switched_on_in_the_old_way() -> None:
    """The two ways must not be mixed by one program; ours must go with either."""
    model, inputs, targets = build(CASES["mlp"], 6, torch.float32)
    move(model)
    batch = on_device((inputs, targets))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        ewc = EWC(model, Classification(), strength=1.0)
        ewc.consolidate([batch])
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    expected = {name: each / 6 for name, each in expected_sums(model, batch).items()}
    assert_near(ewc.fisher, expected, 1e-2)
