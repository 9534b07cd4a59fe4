"""Models of many kinds, each with data and the method that its parameters should go by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and what is expected of it.

    Attributes:
        model: Makes it.
        inputs: Makes the inputs of N samples.
        classes: How many outputs it has, one row for each sample.
        slow: Names of parameters (by prefix) that go by `"vmap"` or `"loop"`; the rest by `"rule"`.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    classes: int = 3
    slow: dict[str, str] | None = None


class Apply(nn.Module):
    """Turns a function into a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def head(width: int, classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(width, classes))


class LastOutput(nn.Module):
    """A recurrent layer and a linear read-out of all its outputs."""

    def __init__(self, layer: nn.Module, width: int, batch_first: bool = True) -> None:
        super().__init__()
        self.layer, self.batch_first = layer, batch_first
        self.read = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.layer(x if self.batch_first else x.transpose(0, 1))
        out = out if self.batch_first else out.transpose(0, 1)
        states = state if isinstance(state, tuple) else (state,)
        last = sum(each.sum((0, 2)) for each in states)
        return self.read(out).tanh().mean(1) * (1 + 0.1 * last).unsqueeze(1)


class Unrolled(nn.Module):
    """A cell in a loop."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.read(state[0] if isinstance(state, tuple) else state)


class Attention(nn.Module):
    def __init__(self, batch_first: bool, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.batch_first, self.cross = batch_first, cross
        self.read = nn.Linear(8, 3)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        source = torch.cat([x, x.flip(-1)], -1)[..., :8] * 0.5 if self.cross else x
        key = source[..., : self.options.get("kdim", 8)]
        value = source[..., : self.options.get("vdim", 8)]
        out, _ = self.attention(x, key, value, need_weights=False)
        out = out if self.batch_first else out.transpose(0, 1)
        return self.read(out.tanh()).mean(1)


class Residual(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], inplace: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = norm(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.act = nn.ReLU(inplace=inplace)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        out = self.second(x)
        out += x
        return self.read(self.act(out).mean((2, 3)))


class Direct(nn.Module):
    """Parameters used without a module: scale, token, position, einsum, a bias by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5) + 0.5)
        self.token = nn.Parameter(torch.randn(1, 1, 5))
        self.position = nn.Parameter(torch.randn(4, 5))
        self.mix = nn.Parameter(torch.randn(5, 3))
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = self.linear(x * self.scale).tanh()
        return torch.einsum("nsi,io->nso", x, self.mix).sum(1) * self.gain


class Queries(nn.Module):
    """Learned tokens that go through layers of their own before they meet the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, 4))
        self.norm, self.query, self.key = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(self.norm(self.queries)).expand(x.shape[0], -1, -1)
        return self.read(F.scaled_dot_product_attention(q, self.key(x), x)).mean(1)


class ByHand(nn.Module):
    """Norms and positions written out, with casts and indices, as transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        self.positions = nn.Parameter(torch.randn(1, 9, 4))
        self.table = nn.Parameter(torch.randn(5, 5, 2))
        self.decay = nn.Parameter(torch.randn(4))
        self.mask_token = nn.Parameter(torch.randn(1, 1, 4))
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[..., :1] > 0).to(x.dtype)
        x = x * mask + self.mask_token * (1 - mask)
        x = x + self.positions[:, : x.shape[1]]
        normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = (1.0 + self.scale.double()).to(x.dtype) * normal - self.offset[None, None]
        at = torch.arange(3, device=x.device)
        at = at[:, None] - at + 2
        bias = self.table[at, at.T].permute(2, 0, 1).contiguous()
        x = (((x @ x.mT).unsqueeze(1) + bias).softmax(-1) @ x.unsqueeze(1)).mean(1)
        x *= torch.exp(-F.softplus(self.decay.double())).to(x.dtype)
        return self.read(x).mean(1)


class ExpertWeights(nn.Module):
    """One tensor for the weights of all experts, those chosen gathered or all applied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 4, 5) / 2)
        self.bias = nn.Parameter(torch.randn(3, 5))
        self.second = nn.Parameter(torch.randn(3, 3, 5) / 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.baddbmm(self.bias.unsqueeze(1), x.expand(3, -1, -1), self.first).tanh()
        out = torch.einsum("eni,eoi->neo", h, self.second)
        chosen = x[:, :3].argmax(1)
        picked = torch.bmm(self.second[chosen], h.sum(0).unsqueeze(2)).squeeze(2)
        return out.mean(1) + picked


class TiedAutoencoder(nn.Module):
    """Its decoder is its encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4) / 2)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(F.linear(F.linear(x, self.weight).tanh(), self.weight.t()))


class Products(nn.Module):
    """The same weight matrix product, written in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, 6) / 3)
        self.b = nn.Parameter(torch.randn(6, 5) / 3)
        self.bias = nn.Parameter(torch.randn(4))
        self.c = nn.Parameter(torch.randn(6, 4) / 3)
        self.d = nn.Parameter(torch.randn(4, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.a).tanh()
        x = torch.matmul(x, self.b).tanh()
        x = x @ self.b.t()
        x = torch.addmm(self.bias, x, self.c).tanh()
        return torch.mm(x, self.d)


class Parts(nn.Module):
    """Linear layers on parts of one packed weight, as attention packs its projections."""

    def __init__(self, overlap: bool = False) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(6, 3) / 2)
        self.bias = nn.Parameter(torch.randn(6))
        self.overlap = overlap

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = self.packed.chunk(2)
        y = F.linear(x, upper, self.bias[:3]).tanh()
        y = F.linear(y, lower, self.bias[3:]).sin() + F.linear(x.cos(), lower)
        return y + F.linear(y, self.packed[1:4]) if self.overlap else y


class Tied(nn.Module):
    """An embedding that is also the output layer, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.embed(x)).tanh()).mean(1)[:, :3]


class Shared(nn.Module):
    """One layer used three times, once with an unbatched input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.layer(x).tanh()).sin()
        return self.read(x * self.layer(x.new_ones(4)))


class Branches(nn.Module):
    """Takes a branch that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum().item() > 0 else self.b(x).tanh()


class Checkpointed(nn.Module):
    """Runs a part of itself again in the reverse pass.

    Args:
        use_reentrant: By PyTorch's older way.
        width: Of the inputs.
        first: A layer in front of that part.
        differentiable: Whether inputs require a gradient, as the older way needs.
    """

    def __init__(
        self,
        use_reentrant: bool = False,
        *,
        width: int = 4,
        first: nn.Module | None = None,
        differentiable: bool = False,
    ) -> None:
        super().__init__()
        self.first = nn.Identity() if first is None else first
        self.block = nn.Sequential(nn.Linear(width, 5), nn.Tanh())
        self.read = nn.Linear(5, 3)
        self.use_reentrant, self.differentiable = use_reentrant, differentiable

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x.clone().requires_grad_() if self.differentiable else x
        return self.read(checkpoint(self.block, x, use_reentrant=self.use_reentrant))


class Square(torch.autograd.Function):
    """A function of the user's that `vmap` can do, but no interception can see."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g * w * w, (2 * g * x * w).sum(0)


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(4) + 0.5)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(Square.apply(x, self.w).tanh())


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.used(x)
        return self.used(self.frozen(x)) + target


class Counting(nn.Module):
    """Writes to a buffer in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean = self.mean + self.count
        return self.layer(x * self.count - self.mean)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.bilinear(x, y)


class Bags(nn.Module):
    def __init__(self, mode: str, padding_idx: int | None = None) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, mode=mode, padding_idx=padding_idx)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.bag(x))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.w.dtype) @ self.w).abs()


class FirstOnly(nn.Module):
    """A transposed batch: the batch axis is not in front inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(1, 0, 2)
        x = self.norm(self.layer(x).tanh())
        x = x.reshape(-1, 4)
        return self.read(x).unflatten(0, (3, -1)).sum(0)


class Translator(nn.Module):
    """An encoder and a decoder, with a mask of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        self.read = nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)
        causal = nn.Transformer.generate_square_subsequent_mask(3, x.device, x.dtype)
        out = self.transformer(
            x,
            x[:, :3].cos(),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return self.read(out.tanh()).mean(1)


class Hypernetwork(nn.Module):
    """Makes the weights that it applies."""

    def __init__(self) -> None:
        super().__init__()
        self.task = nn.Embedding(2, 5)
        self.make = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 15))

    def forward(self, x: Tensor) -> Tensor:
        made = self.make(self.task.weight[1])
        return F.linear(x, made[:12].view(3, 4), made[12:])


class Experts(nn.Module):
    """Sends each sample to the expert that its gate chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(1).max(1)
        out = x.new_zeros(x.shape[0], 3)
        for index, expert in enumerate(self.experts):
            mine = chosen == index
            if mine.any():
                out[mine] = expert(x[mine]) * weight[mine].unsqueeze(1)
        return out


class SharedMemory(nn.Module):
    """Parameters that are parts of one tensor, one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(27)
        self.a = nn.Parameter(flat[:12].view(4, 3).t())
        self.b = nn.Parameter(flat[12:15])
        self.c = nn.Parameter(flat[15:].view(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a, self.b).tanh() + x.sin() @ self.c


class Stateful(nn.Module):
    """Keeps its last state as an attribute, and writes into parts of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.read = nn.Linear(4, 4), nn.Linear(4, 3)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.step(x)
        self.state = out.detach()
        hidden = out.tanh().clone()
        hidden[:, 0] = hidden[:, 1] * 2
        hidden[:, 2:] += 1
        return self.read(hidden)


def rows(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


def indices(high: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(high, (n, *shape))


def _conv(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(make(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


WEIGHT_NORM = nn.utils.parametrizations.weight_norm
SPECTRAL_NORM = nn.utils.parametrizations.spectral_norm
ORTHOGONAL = nn.utils.parametrizations.orthogonal

CASES: dict[str, Case] = {
    "mlp": Case(
        lambda: nn.Sequential(
            nn.Linear(5, 6),
            nn.ReLU(inplace=True),
            nn.Linear(6, 6, bias=False),
            nn.Tanh(),
            nn.Linear(6, 3),
        ),
        rows(5),
    ),
    "sequence mlp": Case(
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4), nn.Flatten(), nn.Linear(20, 3)
        ),
        rows(5, 4),
    ),
    "conv1d": Case(_conv(lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1)), rows(2, 9)),
    "conv1d same": Case(
        _conv(lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular")), rows(2, 7)
    ),
    "conv2d": Case(_conv(lambda: nn.Conv2d(3, 4, 3, padding=1)), rows(3, 6, 5)),
    "conv2d odd": Case(
        _conv(
            lambda: nn.Conv2d(
                4, 6, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2), groups=2
            )
        ),
        rows(4, 7, 6),
    ),
    "conv2d depthwise": Case(
        _conv(lambda: nn.Conv2d(4, 8, 3, groups=4, padding="same", bias=False)), rows(4, 5, 5)
    ),
    "conv3d": Case(_conv(lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1))), rows(2, 3, 5, 4)),
    "conv transpose 1d": Case(
        _conv(lambda: nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1, output_padding=1)),
        rows(4, 5),
    ),
    "conv transpose 2d": Case(
        _conv(lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2)),
        rows(4, 4, 3),
    ),
    "conv transpose 3d": Case(
        _conv(lambda: nn.ConvTranspose3d(2, 2, 2, stride=2)), rows(2, 2, 3, 2)
    ),
    "residual group norm": Case(lambda: Residual(lambda c: nn.GroupNorm(2, c)), rows(2, 5, 5)),
    "residual batch norm": Case(lambda: Residual(nn.BatchNorm2d), rows(2, 5, 5)),
    "residual instance norm": Case(
        lambda: Residual(lambda c: nn.InstanceNorm2d(c, affine=True)), rows(2, 5, 5)
    ),
    "running instance norm": Case(
        lambda: Residual(lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True)),
        rows(2, 5, 5),
    ),
    "layer norm": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm((5, 6)), nn.Tanh(), head(30)),
        rows(5, 4),
    ),
    "rms norm": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Tanh(), head(30)), rows(5, 4)
    ),
    "batch norm 1d": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.PReLU(6), head(6)), rows(4)
    ),
    "prelu": Case(lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.PReLU(), head(8)), rows(1, 3, 3)),
    "rnn": Case(lambda: LastOutput(nn.RNN(3, 4, batch_first=True), 4), rows(5, 3)),
    "rnn relu bidirectional": Case(
        lambda: LastOutput(nn.RNN(3, 4, 2, nonlinearity="relu", bidirectional=True), 8, False),
        rows(5, 3),
    ),
    "gru": Case(lambda: LastOutput(nn.GRU(3, 4, 2, batch_first=True, dropout=0.5), 4), rows(5, 3)),
    "gru bidirectional": Case(
        lambda: LastOutput(nn.GRU(3, 4, bidirectional=True, bias=False), 8, False), rows(5, 3)
    ),
    "lstm": Case(lambda: LastOutput(nn.LSTM(3, 4, 2, batch_first=True), 4), rows(5, 3)),
    "lstm bidirectional": Case(
        lambda: LastOutput(nn.LSTM(3, 4, 2, bidirectional=True), 8, False), rows(5, 3)
    ),
    "lstm projected": Case(
        lambda: LastOutput(nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True, batch_first=True), 4),
        rows(5, 3),
    ),
    "lstm without bias": Case(
        lambda: LastOutput(nn.LSTM(3, 4, batch_first=True, bias=False), 4), rows(5, 3)
    ),
    "rnn cell": Case(lambda: Unrolled(nn.RNNCell(3, 4)), rows(5, 3)),
    "gru cell": Case(lambda: Unrolled(nn.GRUCell(3, 4)), rows(5, 3)),
    "lstm cell": Case(lambda: Unrolled(nn.LSTMCell(3, 4)), rows(5, 3)),
    "attention": Case(lambda: Attention(True), rows(5, 8)),
    "attention, time first": Case(lambda: Attention(False), rows(5, 8)),
    "cross attention": Case(lambda: Attention(True, cross=True), rows(5, 8)),
    "attention of other sizes": Case(
        lambda: Attention(False, cross=True, kdim=5, vdim=3), rows(4, 8)
    ),
    "attention with key bias": Case(
        lambda: Attention(True, add_bias_kv=True, add_zero_attn=True), rows(5, 8)
    ),
    "transformer encoder": Case(
        lambda: nn.Sequential(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
                2,
                enable_nested_tensor=False,
            ),
            head(40),
        ),
        rows(5, 8),
    ),
    "embedding": Case(lambda: nn.Sequential(nn.Embedding(6, 4), head(20)), indices(6, 5)),
    "embedding with padding": Case(
        lambda: nn.Sequential(nn.Embedding(6, 4, padding_idx=-2), head(20)), indices(6, 5)
    ),
    "sparse embedding": Case(
        lambda: nn.Sequential(nn.Embedding(6, 4, sparse=True), head(20)), indices(6, 5)
    ),
    "embedding by frequency": Case(
        lambda: nn.Sequential(nn.Embedding(4, 4, scale_grad_by_freq=True), head(20)),
        indices(4, 5),
        slow={"0.": "any"},
    ),
    "embedding of bounded norm": Case(
        lambda: nn.Sequential(nn.Embedding(6, 4, max_norm=1.0), head(20)),
        indices(6, 5),
        slow={"": "any"},
    ),
    "bag mean": Case(lambda: Bags("mean"), indices(6, 5)),
    "bag sum with padding": Case(lambda: Bags("sum", 2), indices(6, 5)),
    "bag max": Case(lambda: Bags("max", 1), indices(6, 5)),
    "bilinear": Case(TwoInputs, lambda n: (torch.randn(n, 4), torch.randn(n, 3))),
    "direct": Case(Direct, rows(3, 5)),
    "queries": Case(Queries, rows(3, 4)),
    "by hand": Case(ByHand, rows(3, 4)),
    "products": Case(Products, rows(5)),
    "expert weights": Case(ExpertWeights, rows(4)),
    "tied autoencoder": Case(TiedAutoencoder, rows(4)),
    "parts": Case(Parts, rows(3)),
    "overlapping parts": Case(lambda: Parts(True), rows(3)),
    "tied": Case(Tied, indices(7, 5)),
    "shared": Case(Shared, rows(4)),
    "weight norm": Case(
        lambda: nn.Sequential(WEIGHT_NORM(nn.Linear(4, 5)), nn.Tanh(), head(5)),
        rows(4),
    ),
    "spectral norm": Case(
        lambda: nn.Sequential(SPECTRAL_NORM(nn.Linear(4, 5)), nn.Tanh(), head(5)),
        rows(4),
    ),
    "orthogonal": Case(
        lambda: nn.Sequential(ORTHOGONAL(nn.Linear(4, 4)), nn.Tanh(), head(4)),
        rows(4),
    ),
    "translator": Case(Translator, lambda n: (torch.randn(n, 5, 8), torch.arange(n) % 5 + 1)),
    "hypernetwork": Case(Hypernetwork, rows(4)),
    "experts": Case(Experts, rows(4), slow={"": "any"}),
    "shared memory": Case(SharedMemory, rows(4)),
    "stateful": Case(Stateful, rows(4)),
    "channels last": Case(
        lambda: Residual(nn.BatchNorm2d).to(memory_format=torch.channels_last),
        lambda n: torch.randn(n, 2, 5, 5).contiguous(memory_format=torch.channels_last),
    ),
    "branches": Case(Branches, rows(4), slow={"": "loop"}),
    "checkpointed": Case(Checkpointed, rows(4)),
    "own function": Case(OwnFunction, rows(4), slow={"w": "vmap"}),
    "unused and frozen": Case(Unused, rows(4), slow={"unused": "unused"}),
    "writes to buffers": Case(Counting, rows(4), slow={"": "any"}),
    "complex": Case(Complex, rows(4), slow={"w": "vmap"}),
    "moves the batch axis": Case(FirstOnly, rows(3, 4)),
}


def build(
    case: Case, samples: int, dtype: torch.dtype, seed: int = 0
) -> tuple[nn.Module, Any, Tensor]:
    """The model, in train mode, with inputs and class labels."""
    torch.manual_seed(seed)
    model = case.model()
    inputs = case.inputs(samples)
    model.eval()(*(inputs if isinstance(inputs, tuple) else (inputs,)))  # for lazy layers
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)

    def cast(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(dtype.to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = cast(tensor.data)
    inputs = torch.utils._pytree.tree_map_only(Tensor, cast, inputs)
    return model.train(), inputs, torch.randint(case.classes, (samples,))
