"""The models that the benchmarks run, and random data for them.

They are written in the plainest way that all peers can read, where there is one: every layer is a
module, called once, with the batch in dimension 0, also for positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor] | dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model and its data.

    Attributes:
        name: What the tables call it.
        build: Makes the model, with random weights.
        draw: `draw(n)` makes a batch of n random samples.
        batch_size: Samples in a batch.
        batches: Batches in a pass.
    """

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[int], Batch]
    batch_size: int
    batches: int

    def data(self, batches: int) -> list[Batch]:
        """Random batches, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return [self.draw(self.batch_size) for _ in range(batches)]


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Logits, `[N, C]` or `[N, C, S]`."""
    if isinstance(batch, Mapping):
        logits: Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return logits
    result: Tensor = model(batch[0])
    return result


def targets(batch: Batch) -> Tensor:
    """Class indices, `[N]` or `[N, S]`."""
    return batch["labels"] if isinstance(batch, Mapping) else batch[1]


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Each sample's negative log-likelihood, summed over its positions, `[N]`."""
    labels = targets(batch)
    each = F.cross_entropy(_rows(outputs(model, batch)), labels.flatten(), reduction="none")
    return each.view(labels.shape).flatten(1).sum(1) if labels.dim() > 1 else each


def _rows(logits: Tensor) -> Tensor:
    """`[N, C, S]` as `[N * S, C]`, the form in which language models compute their loss."""
    return logits.movedim(1, -1).flatten(0, -2)


def size(batch: Batch) -> int:
    """How many samples there are."""
    return len(targets(batch))


def part(batch: Batch, start: int, stop: int) -> Batch:
    """Samples `start` to `stop - 1`."""
    if isinstance(batch, Mapping):
        return {name: tensor[start:stop] for name, tensor in batch.items()}
    return batch[0][start:stop], batch[1][start:stop]


def gradients(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """The unit of all ratios: forward and backward of the mean loss, `p.grad` untouched."""
    loss = F.cross_entropy(_rows(outputs(model, batch)), targets(batch).flatten())
    return torch.autograd.grad(loss, list(model.parameters()))


class LeNet(nn.Module):
    """Two convolutions and three linear layers, for images of any size with one channel."""

    def __init__(self, pixels: int = 28) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        side = (pixels // 2 - 4) // 2
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, 10]` of images `[N, 1, H, W]`."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, width)
        self.skip = (
            nn.Identity()
            if stride == 1 and inputs == width
            else nn.Conv2d(inputs, width, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ResNet(nn.Module):
    """A stem and three residual blocks with GroupNorm, 32 to 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 1, 1, bias=False)
        self.norm = nn.GroupNorm(8, 32)
        self.blocks = nn.Sequential(
            _ResidualBlock(32, 32, 1), _ResidualBlock(32, 64, 2), _ResidualBlock(64, 128, 2)
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, 10]` of images `[N, 3, H, W]`."""
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        N, S, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(N, S, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(N, S, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small decoder-only Transformer, its head not tied to its embedding."""

    def __init__(
        self, vocabulary: int = 256, width: int = 128, positions: int = 64, layers: int = 3
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*[_TransformerBlock(width, 4) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[N, V, S]` of tokens `[N, S]`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        h = self.token(tokens) + self.position(positions)
        return self.head(self.norm(self.blocks(h))).transpose(1, 2)


class LSTM(nn.Module):
    """One LSTM layer and a linear head on its last state."""

    def __init__(self, inputs: int = 32, width: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, 10]` of sequences `[N, S, inputs]`."""
        return self.head(self.lstm(x)[0][:, -1])


def bert() -> nn.Module:
    """Hugging Face's BERT for two classes, 4 layers of width 128, random weights.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=1000,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def mlp(width: int = 400) -> nn.Module:
    """784 inputs, two hidden layers, 10 classes."""
    return nn.Sequential(
        nn.Linear(784, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def vectors(*shape: int) -> Callable[[int], Batch]:
    """Normal inputs of this shape, ten classes."""
    return lambda n: (torch.randn(n, *shape), torch.randint(10, (n,)))


def tokens(vocabulary: int = 256, positions: int = 64) -> Callable[[int], Batch]:
    """Sequences of tokens, with a target at every position."""

    def draw(n: int) -> Batch:
        drawn: Any = torch.randint(vocabulary, (2, n, positions))
        return drawn[0], drawn[1]

    return draw


def sentences(vocabulary: int = 1000, positions: int = 64) -> Callable[[int], Batch]:
    """What a tokenizer makes of sentences of one length, with one label each."""

    def draw(n: int) -> Batch:
        return {
            "input_ids": torch.randint(vocabulary, (n, positions)),
            "token_type_ids": torch.zeros(n, positions, dtype=torch.long),
            "position_ids": torch.arange(positions).repeat(n, 1),
            "labels": torch.randint(2, (n,)),
        }

    return draw


WORKLOADS = [
    Workload("MLP 784-400-400-10", mlp, vectors(784), 128, 32),
    Workload("LeNet-like CNN", LeNet, vectors(1, 28, 28), 64, 32),
    Workload("ResNet, GroupNorm", ResNet, vectors(3, 32, 32), 32, 8),
    Workload("3-layer GPT", GPT, tokens(), 16, 8),
    Workload("LSTM 32-128", LSTM, vectors(32, 32), 64, 16),
    Workload("Hugging Face BERT", bert, sentences(), 16, 8),
]
