"""The settings that `strength.py` sweeps: networks, sequences of tasks, optimizers.

Each is tiny: a whole sequence takes a second on one core. The data are scikit-learn's digits, a
curve seen in three pieces, and two grammars of characters.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from _digits import permuted, split
from torch import Tensor, nn
from torch.func import functional_call

from ewc import EWC, Classification, Likelihood, OnlineEWC, Regression, TimeSeries

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789+=. \n"
CONTEXT = 24  # characters
VARIANCE = 0.1  # of the regression targets, for the likelihood and the loss

# Tasks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Data of one task, the way the model runs on it, and its measure.

    Attributes:
        measure: `"accuracy"`; `"r2"`, 50 (1 + R2) with R2 clipped to [-1, 1]; or `"bits"`, the
            share of the bits per character of a uniform guess that is saved, at least 0. All in
            points of 100.
        floor: The score of a guess that knows nothing, which a diverged run gets.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    run: Callable[[nn.Module, Tensor], Tensor]
    likelihood: Likelihood
    measure: Literal["accuracy", "r2", "bits"] = "accuracy"
    floor: float = 10.0

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The mean negative log-likelihood of a batch."""
        outputs = self.run(model, x)
        if self.measure == "r2":
            return F.mse_loss(outputs, y) / (2 * VARIANCE)
        return F.cross_entropy(outputs.flatten(0, -2), y.flatten())

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Test score in points; NaN if the outputs are not finite."""
        outputs = self.run(model, self.x_test)
        if not outputs.isfinite().all():
            return math.nan
        if self.measure == "accuracy":
            return 100 * float((outputs.argmax(-1) == self.y_test).float().mean())
        if self.measure == "r2":
            unexplained = F.mse_loss(outputs, self.y_test) / self.y_test.var(correction=0)
            return 50 * (1 + max(-1.0, 1 - float(unexplained)))
        nats = F.cross_entropy(outputs.flatten(0, -2), self.y_test.flatten())
        return 100 * max(0.0, 1 - float(nats) / math.log(len(ALPHABET)))

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """What `EWC` calls."""
        return self.run(model, batch[0])


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """The model, called."""
    outputs: Tensor = model(x)
    return outputs


def on_head(head: Sequence[int]) -> Callable[[nn.Module, Tensor], Tensor]:
    """The model's outputs of one head."""
    return lambda model, x: model(x)[:, list(head)]


def made_for(task: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """A main network with the weights that a hypernetwork makes for a task."""
    return lambda model, x: model(task, x)


def pixels(tasks: int, seed: int) -> list[Task]:
    """Ten digits with their pixels permuted, one head for all tasks."""
    return [Task(*one[:4], plain, Classification()) for one in permuted(tasks, seed)]


def rows(tasks: int, seed: int) -> list[Task]:
    """Ten digits with their rows permuted, one head for all tasks."""
    generator = torch.Generator().manual_seed(seed)
    x, y, x_test, y_test, _ = permuted(1, seed)[0]
    found = []
    for _ in range(tasks):
        order = torch.randperm(8, generator=generator)
        a, b = (one.view(-1, 8, 8)[:, order].flatten(1) for one in (x, x_test))
        found.append(Task(a, y, b, y_test, plain, Classification()))
    return found


def pairs(tasks: int, seed: int) -> list[Task]:
    """Two digits per task, a head for each task."""
    sequence = split(tasks, seed, head_per_task=True)
    return [Task(*t[:4], on_head(t.head), Classification(), floor=50.0) for t in sequence]


def generated(tasks: int, seed: int) -> list[Task]:
    """Permuted pixels, learned by a main network whose weights are generated."""
    sequence = enumerate(permuted(tasks, seed))
    return [Task(*one[:4], made_for(t), Classification()) for t, one in sequence]


def pieces(tasks: int, seed: int) -> list[Task]:
    """A curve, seen in pieces of the x axis."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for task in range(tasks):
        low, size = -3 + 6 * task / tasks, 6 / tasks
        x = low + size * torch.rand(400, 1, generator=generator)
        y = torch.sin(2 * x) + 0.3 * x + 0.1 * torch.randn(400, 1, generator=generator)
        parts = x[:200], y[:200], x[200:], y[200:]
        found.append(Task(*parts, plain, Regression(variance=VARIANCE), "r2", floor=0.0))
    return found


def sentence(rng: random.Random) -> str:
    """A line such as `the lazy dog sees a red bird.` and its end."""
    words = (
        ("a", "the", "one", "every"),
        ("old", "red", "small", "happy", "lazy", "green"),
        ("cat", "dog", "bird", "king", "tree", "river"),
        ("sees", "likes", "finds", "follows", "hears"),
    )
    order = (0, 1, 2, 3, 0, 1, 2)
    return " ".join(rng.choice(words[i]) for i in order) + ".\n"


def addition(rng: random.Random) -> str:
    """A line such as `3+4=7`, and its end."""
    a, b = rng.randrange(10), rng.randrange(10)
    return f"{a}+{b}={a + b}\n"


def texts(tasks: int, seed: int) -> list[Task]:
    """Sentences and then sums: the next character."""
    found = []
    for grammar in (sentence, addition)[:tasks]:
        rng, written = random.Random(seed), ""
        while len(written) < 320 * (CONTEXT + 1):
            written += grammar(rng)
        indices = torch.tensor([ALPHABET.index(one) for one in written])
        data = indices[: 320 * (CONTEXT + 1)].view(320, CONTEXT + 1)
        x, y = data[:, :-1], data[:, 1:]
        parts = x[:256], y[:256], x[256:], y[256:]
        likelihood = TimeSeries(Classification(), batch_first=True)
        found.append(Task(*parts, plain, likelihood, "bits", floor=0.0))
    return found


# Models -------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """64-100-100-10."""
    return nn.Sequential(
        nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def curve() -> nn.Module:
    """1-50-50-1."""
    return nn.Sequential(
        nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)
    )


def cnn() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
    )


class RowLSTM(nn.Module):
    """Reads a digit row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 40, batch_first=True), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        """From `[N, 64]` to `[N, 10]`."""
        return self.out(self.lstm(x.view(-1, 8, 8))[0][:, -1])


class CharacterLSTM(nn.Module):
    """Logits of the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), 24)
        self.lstm, self.out = nn.LSTM(24, 64, batch_first=True), nn.Linear(64, len(ALPHABET))

    def forward(self, indices: Tensor) -> Tensor:
        """From `[N, S]` to `[N, S, characters]`."""
        return self.out(self.lstm(self.characters(indices))[0])


class Block(nn.Module):
    """Attention and a feed-forward network, each beside a shortcut."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """From `[N, S, width]` to `[N, S, width]`."""
        q, k, v = (
            one.unflatten(-1, (4, -1)).transpose(1, 2)
            for one in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.project(seen.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class RowTransformer(nn.Module):
    """Classifies a digit from its rows."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.rows = nn.Linear(8, width)
        self.positions = nn.Parameter(0.1 * torch.randn(8, width))
        self.block = Block(width, causal=False)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """From `[N, 64]` to `[N, 10]`."""
        tokens = self.rows(x.view(-1, 8, 8)) + self.positions
        return self.out(self.norm(self.block(tokens)).mean(1))


class CharacterTransformer(nn.Module):
    """Logits of the next character."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Parameter(0.1 * torch.randn(CONTEXT, width))
        self.block = Block(width, causal=True)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, len(ALPHABET))

    def forward(self, indices: Tensor) -> Tensor:
        """From `[N, S]` to `[N, S, characters]`."""
        return self.out(self.norm(self.block(self.characters(indices) + self.positions)))


class LoRA(nn.Module):
    """A frozen linear layer, and beside it two small trained matrices (Hu et al., 2021)."""

    def __init__(self, frozen: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, frozen.in_features) / frozen.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """From `[..., in]` to `[..., out]`."""
        return self.frozen(x) + F.linear(F.linear(x, self.down), self.up)


def with_lora(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A model trained on plain digits, then frozen, with `LoRA` around its linear layers."""

    def build_with_lora() -> nn.Module:
        model = build()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        x, y, *_ = permuted(1, 999)[0]
        x = x[:, torch.randperm(64, generator=torch.Generator().manual_seed(999))]
        for _ in range(300):
            chosen = torch.randint(len(x), (32,))
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                model.set_submodule(name, LoRA(module))
        return model

    return build_with_lora


class Hypernetwork(nn.Module):
    """From the number of a task to the outputs of a main network, whose weights it makes."""

    def __init__(self, tasks: int = 5) -> None:
        super().__init__()
        main = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.shapes = {name: one.shape for name, one in main.named_parameters()}
        self.embeddings, self.hidden = nn.Embedding(tasks, 16), nn.Linear(16, 32)
        self.out = nn.Linear(32, sum(shape.numel() for shape in self.shapes.values()))
        nn.init.normal_(self.out.weight, std=0.02)
        with torch.no_grad():
            self.out.bias.copy_(torch.cat([one.flatten() for one in main.parameters()]))
        self._main = [copy.deepcopy(main).requires_grad_(False).to("meta")]  # no submodule

    def forward(self, task: int, x: Tensor) -> Tensor:
        """From `[N, 64]` to `[N, 10]`."""
        flat = self.out(torch.tanh(self.hidden(self.embeddings(torch.tensor(task)))))
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        shapes = self.shapes.items()
        weights = {n: part.view(s) for (n, s), part in zip(shapes, parts, strict=True)}
        outputs: Tensor = functional_call(self._main[0], weights, (x,))
        return outputs


# Settings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A model that learns a sequence of tasks.

    Attributes:
        data: From a number of tasks and a seed to the tasks.
        model: Builds it.
        optimizer: `"SGD"`, `"Adam"` or `"AdamW"`; a new one for each task.
        steps: For each task, of 32 samples each.
        decay: None for `EWC`, else that of `OnlineEWC`.
    """

    data: Callable[[int, int], list[Task]]
    tasks: int
    model: Callable[[], nn.Module]
    optimizer: str
    lr: float
    momentum: float = 0.0
    steps: int = 200
    decay: float | None = None
    fisher_type: Literal["empirical", "exact"] = "empirical"

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer divides by the size of the gradients."""
        return self.optimizer != "SGD"

    @property
    def bound(self) -> float:
        """What `strength * largest` must stay below with SGD."""
        return math.inf if self.adaptive else 2 * (1 + self.momentum) / self.lr

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new optimizer for the parameters that are trained."""
        trained = [one for one in model.parameters() if one.requires_grad]
        if self.optimizer == "SGD":
            return torch.optim.SGD(trained, lr=self.lr, momentum=self.momentum)
        kind = torch.optim.Adam if self.optimizer == "Adam" else torch.optim.AdamW
        return kind(trained, lr=self.lr)

    def ewc_of(self, model: nn.Module, task: Task) -> EWC:
        """`EWC` or `OnlineEWC`, not yet consolidated."""
        options: dict[str, Any] = {"strength": 0.0, "fisher_type": self.fisher_type}
        if self.decay is None:
            return EWC(model, task.likelihood, **options)
        return OnlineEWC(model, task.likelihood, decay=self.decay, **options)


SGD = {"optimizer": "SGD", "lr": 0.05, "momentum": 0.9}
PLAIN = {"optimizer": "SGD", "lr": 0.1}
ADAM = {"optimizer": "Adam", "lr": 0.001}
ADAMW = {"optimizer": "AdamW", "lr": 0.001}

SETTINGS: dict[str, Setting] = {
    "MLP, pixels": Setting(pixels, 5, mlp, **SGD),
    "MLP, pixels, online": Setting(pixels, 5, mlp, **SGD, decay=1.0),
    "MLP, pixels, long": Setting(pixels, 2, mlp, **SGD, steps=1500),
    "MLP, pixels, short": Setting(pixels, 2, mlp, **PLAIN, steps=80),
    "MLP, pixels, fast": Setting(pixels, 5, mlp, "SGD", 0.2),
    "MLP, 10 x pixels": Setting(pixels, 10, mlp, **SGD, steps=120),
    "MLP, 10 x pixels, online": Setting(pixels, 10, mlp, **PLAIN, steps=200, decay=0.9),
    "MLP, pairs": Setting(pairs, 5, mlp, **SGD, steps=120),
    "CNN, pairs, online": Setting(pairs, 5, cnn, **SGD, steps=120, decay=0.9),
    "CNN, pixels, fast": Setting(pixels, 3, cnn, "SGD", 0.1, 0.9),
    "LSTM, rows": Setting(rows, 2, RowLSTM, **SGD, steps=400),
    "transformer, pixels": Setting(pixels, 3, RowTransformer, **SGD),
    "LoRA on an MLP, pixels": Setting(pixels, 3, with_lora(mlp), **SGD),
    "regression": Setting(pieces, 3, curve, "SGD", 0.01, 0.9, steps=500, fisher_type="exact"),
    "hypernetwork": Setting(generated, 3, Hypernetwork, "SGD", 0.01, 0.9, steps=300),
    "transformer, text": Setting(texts, 2, CharacterTransformer, "SGD", 0.1, 0.9, steps=300),
    "MLP, pixels, Adam": Setting(pixels, 5, mlp, **ADAM),
    "MLP, pixels, long, Adam": Setting(pixels, 2, mlp, **ADAM, steps=1500),
    "MLP, 10 x pixels, Adam": Setting(pixels, 10, mlp, **ADAM, steps=120),
    "MLP, 10 x pixels, online, AdamW": Setting(pixels, 10, mlp, **ADAMW, steps=120, decay=0.9),
    "CNN, pairs, Adam": Setting(pairs, 5, cnn, **ADAM, steps=120),
    "LSTM, rows, AdamW": Setting(rows, 3, RowLSTM, "AdamW", 0.003, steps=200),
    "transformer, pixels, online, Adam": Setting(pixels, 3, RowTransformer, **ADAM, decay=1.0),
    "LoRA on a transformer, pixels, AdamW": Setting(
        pixels, 3, with_lora(RowTransformer), "AdamW", 0.003
    ),
    "regression, AdamW": Setting(pieces, 3, curve, "AdamW", 0.003, steps=500, fisher_type="exact"),
    "hypernetwork, Adam": Setting(generated, 3, Hypernetwork, "Adam", 0.003),
    "LSTM, text, Adam": Setting(texts, 2, CharacterLSTM, "Adam", 0.003, steps=200),
}
