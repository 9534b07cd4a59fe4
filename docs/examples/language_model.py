"""A small language model, fine-tuned on one text and then on another, with LoRA and without.

A character-level transformer is pretrained on words and signs in no order. Then it learns to
write sentences, and after them sums. With plain fine-tuning it then forgets how to write
sentences. EWC protects the parameters that are trained: all weights, or, with LoRA, only the
small matrices beside the frozen weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc import EWC, Classification, TimeSeries

# Colours that can be told apart with any colour vision.
BLUE, VERMILION = "#0072B2", "#D55E00"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})

CONTEXT = 32  # characters
BATCH = 16
PRETRAINING = 300  # steps
STEPS = 150  # for each text
EVERY = 30  # from one test to the next
RATES = {"all weights": 0.003, "LoRA": 0.005}  # learning rates
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789+=. \n"

# The texts ----------------------------------------------------------------------------------

ARTICLES = ("a", "the", "one", "every")
ADJECTIVES = ("old", "red", "small", "happy", "lazy", "green")
NOUNS = ("cat", "dog", "bird", "king", "tree", "river")
VERBS = ("sees", "likes", "finds", "follows", "hears")
SIGNS = ("+", "=", ".", "\n")


def words(rng: random.Random) -> str:
    """What the model is pretrained on: words, numbers and signs in no order."""
    kind = rng.choice([ARTICLES, ADJECTIVES, NOUNS, VERBS, SIGNS, range(20)])
    return f"{rng.choice(kind)}{rng.choice(('', ' '))}"


def sentence(rng: random.Random) -> str:
    """A line such as `the lazy dog sees a red bird.` and its end."""
    subject, thing = (
        f"{rng.choice(ARTICLES)} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2)
    )
    return f"{subject} {rng.choice(VERBS)} {thing}.\n"


def addition(rng: random.Random) -> str:
    """A line such as `3+4=7`."""
    a, b = rng.randrange(10), rng.randrange(10)
    return f"{a}+{b}={a + b}\n"


def text(grammar: Callable[[random.Random], str], seed: int, windows: int = 400) -> Tensor:
    """Windows of a text, as indices of characters: [windows, CONTEXT + 1]."""
    rng, written = random.Random(seed), ""
    while len(written) < windows * (CONTEXT + 1):
        written += grammar(rng)
    indices = torch.tensor([ALPHABET.index(character) for character in written])
    return indices[: windows * (CONTEXT + 1)].view(windows, CONTEXT + 1)


# The model ----------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal attention and a feed-forward network, each beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """From `[N, S, width]` to `[N, S, width]`."""
        q, k, v = (
            one.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Logits of the next character, from a single block."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.block = Block(width, heads)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, len(ALPHABET))

    def forward(self, indices: Tensor) -> Tensor:
        """From `[N, S]` to `[N, S, characters]`."""
        positions = self.positions(torch.arange(indices.shape[1]))
        return self.out(self.norm(self.block(self.characters(indices) + positions)))


class LoRA(nn.Module):
    """A frozen linear layer, and beside it two small trained matrices (Hu et al., 2021)."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Parameter(torch.randn(rank, frozen.in_features) / frozen.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """From `[..., in]` to `[..., out]`."""
        return self.frozen(x) + F.linear(F.linear(x, self.down), self.up)


def with_lora(model: Transformer, rank: int = 16) -> Transformer:
    """The model with all its weights frozen and `LoRA` around its linear layers."""
    model.requires_grad_(False)
    for name in ("qkv", "project", "up", "down"):
        setattr(model.block, name, LoRA(getattr(model.block, name), rank))
    model.out = LoRA(model.out, rank)
    return model


# The learning -------------------------------------------------------------------------------


def train(
    model: nn.Module,
    data: Tensor,
    steps: int,
    lr: float,
    regularizer: Callable[[], Tensor | float] = float,
    test: Callable[[], None] = lambda: None,
) -> None:
    """Minimise the mean loss per character and the penalty; `float()` is 0."""
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=lr)
    for step in range(1, steps + 1):
        windows = data[torch.randint(len(data), (BATCH,))]
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) + regularizer()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            test()


@torch.no_grad()
def bits(model: nn.Module, data: Tensor) -> float:
    """Bits per character on held-out text."""
    logits = model(data[:, :-1])
    nats = F.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
    return float(nats) / math.log(2)


def fine_tune(
    model: nn.Module, strength: float | Literal["auto"], lr: float, steps: int, seed: int
) -> Tensor:
    """Learn sentences, consolidate, learn sums.

    Returns:
        Bits per character on held-out sentences and sums, every `EVERY` steps: [tests, 2].
    """
    regularizer = EWC(model, TimeSeries(Classification(), batch_first=True), strength=strength)
    held_out = [text(grammar, seed + 1, windows=60) for grammar in (sentence, addition)]
    curve = [[bits(model, data) for data in held_out]]

    def test() -> None:
        curve.append([bits(model, data) for data in held_out])

    sentences, sums = text(sentence, seed), text(addition, seed)
    train(model, sentences, steps, lr, regularizer, test)
    # Windows are samples: inputs [N, S], and the characters that follow them, [N, S].
    regularizer.consolidate([(sentences[:, :-1], sentences[:, 1:])])
    train(model, sums, steps, lr, regularizer, test)
    return torch.tensor(curve)


def compare(
    seed: int, steps: int = STEPS, pretraining: int = PRETRAINING
) -> dict[tuple[str, str], Tensor]:
    """With LoRA and without, with EWC and without, all from the same pretrained model."""
    torch.manual_seed(seed)
    pretrained = Transformer()
    train(pretrained, text(words, seed), pretraining, 0.003)
    results = {}
    for trained, lr in RATES.items():
        for method, strength in (("fine-tuning", 0.0), ("EWC", "auto")):
            torch.manual_seed(seed)
            model = copy.deepcopy(pretrained)
            if trained == "LoRA":
                model = with_lora(model)
            results[trained, method] = fine_tune(model, strength, lr, steps, seed)
    return results


def check(results: dict[tuple[str, str], Tensor]) -> None:
    """What this example claims: with EWC sentences are kept and sums learned, in both ways."""
    for trained in RATES:
        plain, ours = (results[trained, method] for method in ("fine-tuning", "EWC"))
        assert ours[-1, 0] < plain[-1, 0] - 1, f"{trained}: {ours[-1]} against {plain[-1]}"
        assert ours[-1, 1] < 0.6 * ours[0, 1], f"{trained}: sums are not learned, {ours[:, 1]}"


def draw(results: dict[tuple[str, str], Tensor], path: Path) -> None:
    """A column for each way of training, a row for each text."""
    figure = plt.figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for (trained, method), curve in results.items():
        column = list(RATES).index(trained)
        colour, style = (BLUE, "-") if method == "EWC" else (VERMILION, "--")
        x = EVERY * torch.arange(len(curve))
        for row, axis in enumerate(axes[:, column]):
            axis.plot(x, curve[:, row], style, color=colour, linewidth=2, label=method)
    half = float(x[-1]) / 2
    for row, name in enumerate(("sentences", "sums")):
        axes[row, 0].set_ylabel(f"{name}: bits\nper character")
        for axis in axes[row]:
            axis.axvspan(row * half, (row + 1) * half, color="#efefef", lw=0)
            axis.set(xlim=(0, 2 * half), ylim=(0, None))
    for column, trained in enumerate(RATES):
        axes[0, column].set_title(trained, loc="left", weight="bold")
        axes[1, column].set_xticks([half / 2, 1.5 * half], ["learning sentences", "learning sums"])
        axes[1, column].tick_params(axis="x", length=0)
    axes[0, 0].legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Compare, print, draw, and check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("language_model.png"), help="picture")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for products this small
    results = compare(options.seed)
    print("Bits per character after both texts")
    print(f"{'trained':14}{'method':14}{'sentences':>10}{'sums':>8}")
    for (trained, method), curve in results.items():
        sentences, sums = curve[-1].tolist()
        print(f"{trained:14}{method:14}{sentences:10.2f}{sums:8.2f}")
    draw(results, options.out)
    print(f"Picture: {options.out}")
    check(results)


if __name__ == "__main__":
    main()
