"""A small causal transformer of characters, LoRA for it, and texts that it writes itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _texts import OTHER, START, SYMBOLS
from torch import Tensor, nn
from torch.func import functional_call

LENGTH = 48  # characters of a window
WIDTH, HEADS, BLOCKS = 64, 4, 2
BATCH = 16


class Block(nn.Module):
    """Causal attention and a feed-forward network, each beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From `[N, S, WIDTH]` to `[N, S, WIDTH]`."""
        q, k, v = (
            one.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for one in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Logits of the next character, of those before it in the window."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, OTHER + 1)

    def forward(self, symbols: Tensor) -> Tensor:
        """From `[N, S]` to `[N, S, OTHER + 1]`."""
        x = self.symbols(symbols) + self.positions.weight[: symbols.shape[1]]
        return self.out(self.norm(self.blocks(x)))


class LoRA(nn.Module):
    """A frozen model, and two small trained matrices beside each weight of its blocks.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """

    def __init__(self, base: nn.Module, rank: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.names = adapted(base)
        weights = [base.get_parameter(name) for name in self.names]
        self.ups = nn.ParameterList(torch.zeros(len(one), rank) for one in weights)
        self.downs = nn.ParameterList(
            torch.randn(rank, one.shape[1]) / one.shape[1] ** 0.5 for one in weights
        )

    def weights(self) -> dict[str, Tensor]:
        """The weights in use, by name: those of the base plus `up @ down`."""
        matrices = zip(self.names, self.ups, self.downs, strict=True)
        return {name: self.base.get_parameter(name) + up @ down for name, up, down in matrices}

    def forward(self, symbols: Tensor) -> Tensor:
        """As the base, with the weights in use."""
        logits: Tensor = functional_call(self.base, self.weights(), (symbols,))
        return logits


def adapted(base: nn.Module) -> list[str]:
    """The weights that have an adapter: the matrices of the blocks."""
    return [
        name
        for name, one in base.named_parameters()
        if one.dim() == 2 and name.startswith("blocks.")
    ]


def split(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and the characters that follow them, `[N, LENGTH]` each."""
    return windows[:, :-1], windows[:, 1:]


def nats(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean NLL of a character."""
    inputs, following = split(windows)
    return F.cross_entropy(model(inputs).flatten(0, 1), following.flatten())


@torch.no_grad()
def bits(model: nn.Module, windows: Tensor) -> float:
    """Bits per character."""
    return float(nats(model, windows)) / math.log(2)


def train(
    model: nn.Module,
    batch: Callable[[], Tensor],
    steps: int,
    lr: float,
    penalty: Callable[[], Tensor | float] = float,
) -> None:
    """Adam; the rate falls to 0 along a cosine. `float()` is 0."""
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = nats(model, batch()) + penalty()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def written(model: nn.Module, number: int, generator: torch.Generator) -> Tensor:
    """Windows that the model writes, one character after the other: `[number, 1 + LENGTH]`."""
    windows = torch.full((number, 1), START)
    for _ in range(LENGTH):
        probabilities = model(windows)[:, -1].softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        windows = torch.cat([windows, drawn], 1)
    return windows
