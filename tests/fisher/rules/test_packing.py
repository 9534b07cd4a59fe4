"""Sequences packed in the forward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.support.fisher import TYPES, double, holds

pytestmark = [
    pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part"),
]

LAYERS: dict[str, Any] = {
    "RNN": lambda: nn.RNN(4, 5, batch_first=True),
    "GRU, two ways": lambda: nn.GRU(4, 5, bidirectional=True, batch_first=True),
    "LSTM, deep": lambda: nn.LSTM(4, 5, 2, batch_first=True),
    "LSTM, projected": lambda: nn.LSTM(4, 6, proj_size=5, bidirectional=True, batch_first=True),
}


class Packed(nn.Module):
    """Packs, runs a layer over time, and pads again: reads all outputs and the last states."""

    def __init__(self, layer: Any, *, is_sorted: bool = False, total: int | None = None) -> None:
        super().__init__()
        self.layer, self.read = layer(), nn.LazyLinear(3)
        self.is_sorted, self.total = is_sorted, total

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), True, enforce_sorted=self.is_sorted)
        out, last = self.layer(packed)
        padded, sizes = pad_packed_sequence(out, True, 0.5, self.total)
        last = last[0] if isinstance(last, tuple) else last
        total = padded[:, :1].sum(1) + padded.tanh().sum(1) / sizes[:, None]
        return self.read(torch.cat([total, last[-1]], 1))


def batches(*, is_sorted: bool = False) -> list[Any]:
    torch.manual_seed(3)
    found = []
    for n in (2, 1, 7, 6):
        lengths = torch.randint(1, 4, (n,))
        lengths = lengths.sort(descending=True).values if is_sorted else lengths
        x = torch.randn(n, 4, 4).double()
        found.append(((x, lengths), torch.randint(3, (n,))))
    return found


def made(layer: Any, **options: Any) -> nn.Module:
    net = Packed(layer, **options).double()
    net(*batches()[1][0])
    return double(lambda: net)


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_packed_sequences_go_by_rule(layer: str, fisher_type: str) -> None:
    paths = holds(made(LAYERS[layer], total=5), batches(), fisher_type)
    assert set(paths.values()) == {"rule"}


def test_sorted_sequences() -> None:
    net = made(LAYERS["RNN"], is_sorted=True, total=4)
    assert set(holds(net, batches(is_sorted=True), "empirical").values()) == {"rule"}


class Documents(nn.Module):
    """A sample is a document of three sentences, which are packed."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.read = nn.LSTM(4, 5), nn.Linear(5, 3)
        self.lengths = torch.tensor(lengths)

    def forward(self, x: Tensor) -> Tensor:
        sentences = x.flatten(0, 1).transpose(0, 1)
        lengths = self.lengths.repeat(len(x))
        packed = pack_padded_sequence(sentences, lengths, enforce_sorted=False)
        padded, _ = pad_packed_sequence(self.layer(packed)[0])
        return self.read(padded.transpose(0, 1).unflatten(0, (len(x), 3)).sum((1, 2)))


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize(("lengths", "method"), [((2, 2, 2), "rule"), ((4, 1, 3), "vmap")])
def test_several_sequences_in_a_sample(
    lengths: tuple[int, ...], method: str, fisher_type: str
) -> None:
    torch.manual_seed(3)
    documents = [(torch.randn(n, 3, 4, 4).double(), torch.randint(3, (n,))) for n in (2, 1, 5)]
    paths = holds(double(lambda: Documents(lengths)), documents, fisher_type)
    assert {paths["layer.weight_ih_l0"], paths["layer.bias_hh_l0"]} == {method}
    assert paths["read.weight"] == "rule"
