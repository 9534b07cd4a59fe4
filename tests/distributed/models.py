"""Models, data and ways to shard them, for the cases that several processes run together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from tests.support.asserts import assert_close

CLASSES = 5


class Attentive(nn.Module):
    """A layer of a transformer, a token and positions of its own, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 8)
        self.position = nn.Parameter(torch.randn(6, 8))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x).mean(1), self.embed.weight)


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)
        )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 7, batch_first=True)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, CLASSES)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (6,)),
    "convolutional": (Convolutional, (1, 6, 6)),
    "recurrent": (Recurrent, (4, 3)),
    "attentive": (Attentive, ()),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


def data(name: str, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (samples,), generator=generator)
    if name == "attentive":
        return torch.randint(CLASSES, (samples, 6), generator=generator), targets
    return torch.randn(samples, *MODELS[name][1], generator=generator), targets


def share(batch: tuple[Tensor, Tensor], rank: int, sizes: list[int]) -> list[Any]:
    begin = sum(sizes[:rank])
    x, y = (each[begin : begin + sizes[rank]] for each in batch)
    step = 2 + rank
    return [(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step)]


def assert_whole(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """Sharded tensors, whole, are what is expected."""
    assert all(isinstance(each, DTensor) for each in found.values())
    assert_close({n: full(each) for n, each in found.items()}, expected, 1e-10, relative=rtol)


def shard(model: nn.Module, how: str, **options: Any) -> None:
    if how == "layers":
        for child in model.children():
            for one in child if isinstance(child, nn.ModuleList) else [child]:
                if any(True for _ in one.parameters()) and one is not getattr(model, "embed", None):
                    fully_shard(one, **options)
    if how == "nested":
        for module in reversed(list(model.modules())):
            own = any(True for _ in module.parameters(recurse=False))
            inside = isinstance(module, nn.MultiheadAttention) or module is getattr(
                model, "embed", None
            )
            if own and not inside and type(module).__name__ != "NonDynamicallyQuantizableLinear":
                fully_shard(module, **options)
    if not hasattr(model, "unshard"):
        fully_shard(model, **options)


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
