"""Modules that mix samples are refused; rounding and random numbers are told apart from them."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc import EWC, Classification
from tests.support.asserts import raises, unchanged

pytestmark = pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning")


class Amplifying(nn.Module):
    """Rounds in another way for each size of a batch, and amplifies the difference to any size."""

    def __init__(self, mixer: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.mixer, self.head = nn.Linear(4, 5), mixer or nn.Identity(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mixer(self.layer(x))
        h = (h + 10.0 ** (2 + len(x))) - 10.0 ** (2 + len(x))
        outputs: Tensor = self.head(torch.sin(1e6 * h))
        return outputs


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Sized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.02 * len(x))


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 4).to(dtype), torch.tensor([0, 1, 2, 1])


def consolidate(net: nn.Module) -> None:
    ewc, batch = EWC(net, Classification()), data()
    with unchanged(None, net):
        ewc.consolidate([batch])


def test_the_model_amplifies_rounding_beyond_the_tolerance() -> None:
    net, (x, _) = Amplifying(), data()
    assert (net(x[:2])[:1] - net(x[:1])).abs().max() > 0.1


def test_rounding_that_is_amplified_is_not_mixing() -> None:
    consolidate(Amplifying())


@pytest.mark.parametrize("mixer", [Centred(), Sized()])
def test_mixing_beside_rounding_that_is_amplified(mixer: nn.Module) -> None:
    net = Amplifying(mixer)
    name = f"module 'mixer' ({type(mixer).__name__}) mixes them"
    with raises(ValueError, name):
        consolidate(net)


def test_a_cast_to_float32_in_forward() -> None:
    class Casting(Amplifying):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float().to(torch.float32))

    consolidate(Casting())


def test_a_model_that_cannot_be_copied() -> None:
    net: Any = Amplifying()
    net.lock = threading.Lock()
    with raises(ValueError, "the model (Amplifying) seems to mix them", "amplifies rounding"):
        consolidate(net)


class Noisy(nn.Module):
    def __init__(self, draw: Any, mixer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.mixer, self.head = nn.Linear(4, 5), mixer or nn.Identity(), nn.Linear(5, 3)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.mixer(self.layer(x) + self.draw(x)))
        return outputs


def normal(x: Tensor) -> Tensor:
    return torch.randn(len(x), 5)


def as_many_as_values_require(x: Tensor) -> Tensor:
    return torch.poisson(x.abs()).sum(1, keepdim=True) + torch.rand(len(x), 1)


@pytest.mark.parametrize("draw", [normal, as_many_as_values_require])
def test_random_numbers_are_not_mixing(draw: Any) -> None:
    consolidate(Noisy(draw))


def test_mixing_beside_random_numbers() -> None:
    with raises(ValueError, "module 'mixer' (Centred) mixes them"):
        consolidate(Noisy(normal, Centred()))


@pytest.mark.filterwarnings("ignore::ewc.ZeroFisherWarning")  # one sample, centred, is zero
@pytest.mark.parametrize("read_ahead", [True, False], ids=["list", "generator"])
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [1, 3], [1, 1, 2]])
def test_mixing_after_a_first_batch_of_one_sample(sizes: list[int], read_ahead: bool) -> None:
    """Samples of batches of one are never mixed, bundled or not."""
    x, y = data()
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    net = Amplifying(Centred())
    ewc = EWC(net, Classification())
    if max(sizes) == 1:
        ewc.consolidate(batches if read_ahead else iter(batches))
        return
    with (
        unchanged(ewc, net),
        raises(ValueError, "module 'mixer' (Centred) mixes them"),
    ):
        ewc.consolidate(batches if read_ahead else iter(batches))


@pytest.mark.parametrize("read_ahead", [True, False], ids=["list", "generator"])
def test_no_mixing_after_a_first_batch_of_one_sample(read_ahead: bool) -> None:
    x, y = data()
    for net in (Noisy(normal), Amplifying()):
        batches = list(zip(x.split([1, 3]), y.split([1, 3]), strict=True))
        with unchanged(None, net):
            EWC(net, Classification()).consolidate(batches if read_ahead else iter(batches))
