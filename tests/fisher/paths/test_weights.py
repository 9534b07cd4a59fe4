"""Weights of many kinds that a model makes before they meet the samples."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrizations, parametrize

from tests.support.fisher import Batch, data, double, holds, sequences
from tests.support.rules import Applied

Function = Callable[..., Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning"),
    pytest.mark.filterwarnings("ignore::ewc.ZeroFisherWarning"),  # of parameters that are not used
]

MIX = torch.tensor([[1.0, -2, 0], [0, 1, 3], [2, 0, -1]], dtype=torch.float64)


def lower(entries: Tensor) -> Tensor:
    """A triangular matrix filled by an index."""
    factor = torch.zeros(3, 3).double()
    rows, columns = torch.tril_indices(3, 3)
    factor[rows, columns] = entries
    return factor.tril(-1) + factor.diagonal().exp().diag()


def reflections(p: Tensor) -> Tensor:
    each = [torch.eye(3).double() - 2 * torch.outer(v, v) / (v @ v) for v in p]
    return reduce(torch.matmul, each)


def written_into(p: Tensor) -> Tensor:
    w = torch.zeros(3, 3).double()
    w += p
    w[1:] *= 2
    return w.sin_()


def grid(p: Tensor, mode: str) -> Tensor:
    return F.interpolate(p[None, None], size=(3, 3), mode=mode)[0, 0]


class Clipped(torch.autograd.Function):
    """Its reverse pass is not linear."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor) -> Tensor:
        return p.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.1, 0.1)


def clipped_by_a_hook(p: Tensor) -> Tensor:
    made = p.exp()
    made.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return made


MADE: dict[str, tuple[Function, tuple[int, ...]]] = {
    "views of views": (lambda p: p.view(2, 3, 3)[1].t()[1:].repeat(2, 1)[:3].t().t(), (6, 3)),
    "expanded": (lambda p: p.expand(3, 3) + torch.eye(3), (1, 3)),
    "one number": (lambda p: p.exp() * torch.eye(3).double().cumsum(0), ()),
    "one number twice": (lambda p: torch.cat([p, p, p.new_ones(7)]).view(3, 3), (1,)),
    "heights": (lambda p: p.softmax(0).cumsum(0).expand(3, 3) * torch.eye(3).double(), (3,)),
    "a stencil": (lambda p: p.expand(3) * torch.tensor([1.0, -3.0, -1.0]).double()[:, None], (3,)),
    "another stencil": (lambda p: torch.stack([p, p * -2, p * 2]), (3,)),
    "loosely coupled": (lambda p: p + 1e-8 * p.flip(0), (3, 3)),
    "repeated rows": (lambda p: p[torch.tensor([0, 1, 0])], (2, 3)),
    "put next to itself": (lambda p: torch.cat([p, p])[:3], (2, 3)),
    "triangular": (lower, (6,)),
    "reflections": (reflections, (3, 3)),
    "rotation": (lambda p: torch.matrix_exp(p - p.t()), (3, 3)),
    "Toeplitz": (lambda p: p[torch.arange(3)[:, None] - torch.arange(3) + 2], (5,)),
    "windows": (lambda p: p.unfold(0, 3, 1), (5,)),
    "windows apart": (lambda p: p.unfold(0, 3, 3), (9,)),
    "scattered": (
        lambda p: torch.zeros(3, 3).double().scatter(1, torch.tensor([[0, 1], [2, 0]]), p),
        (2, 2),
    ),
    "scattered and added": (
        lambda p: torch.zeros(3, 3).double().scatter_add(1, torch.tensor([[0, 0], [2, 0]]), p),
        (2, 2),
    ),
    "blocks": (lambda p: torch.block_diag(p[:2, :2], p[2:, 2:]), (3, 3)),
    "selected": (lambda p: torch.eye(3).double()[[2, 0, 0]] @ p, (3, 3)),
    "permuted": (lambda p: torch.eye(3).double()[[2, 0, 1]] @ p, (3, 3)),
    "masked": (lambda p: p[torch.arange(12).view(4, 3) % 4 > 0].view(3, 3), (4, 3)),
    "padded": (lambda p: F.pad(p, (0, 1, 1, 0)), (2, 2)),
    "reflected": (lambda p: F.pad(p[None], (1, 0), mode="reflect")[0], (3, 2)),
    "resized": (lambda p: grid(p, "bilinear"), (2, 2)),
    "copied to a finer grid": (lambda p: grid(p, "nearest"), (2, 2)),
    "written into": (written_into, (3, 3)),
    "summed up": (lambda p: p.softmax(0).cumsum(0), (3, 3)),
    "largest": (lambda p: p.topk(3, 0).values, (4, 3)),
    "inverse": (lambda p: torch.linalg.inv(torch.eye(3) * 4 + p), (3, 3)),
    "orthogonal factor": (lambda p: torch.linalg.qr(p)[0], (3, 3)),
    "straight through": (lambda p: p + (p.round() - p).detach(), (3, 3)),
    "low rank": (lambda p: torch.eye(3) + 2 * p[:, :2] @ p[:, 2:].t(), (3, 4)),
    "of unit norm": (lambda p: p / p.norm(dim=1, keepdim=True).detach(), (3, 3)),
    "chosen": (lambda p: torch.where(p > 0, p, p.t()), (3, 3)),
    "clipped": (lambda p: p.clamp(-0.5, 0.5), (3, 3)),
    "with clipped gradients": (Clipped.apply, (3, 3)),
    "with a hook": (clipped_by_a_hook, (3, 3)),
    "real parts": (lambda p: torch.view_as_complex(p).abs(), (3, 3, 2)),
    "by Fourier": (lambda p: torch.fft.irfft(torch.fft.rfft(p) * p[0], n=3), (3, 2)),
    "mapped": (lambda p: vmap(lambda row: row / row.norm())(p), (3, 3)),
}


@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
@pytest.mark.parametrize("name", MADE)
def test_made_of_a_parameter(name: str, fisher_type: str) -> None:
    make, shape = MADE[name]
    torch.manual_seed(0)
    net = Applied(lambda x, p: F.linear(x, make(p)).tanh() @ MIX, shape).double()
    holds(net, data(3), fisher_type)


USED: dict[str, Function] = {
    "as it is and as a part": lambda x, p, q: F.linear(x, p).tanh() + x * p[0] + x @ p,
    "directly and viewed": lambda x, p, q: F.linear(F.linear(x, p), p.view(3, 3)),
    "with another": lambda x, p, q: F.linear(x * (p.diag().exp() + q[0]), p * q) + x * q[1],
    "compared": lambda x, p, q: F.linear(x * (x > p[0]), q * (q > q.mean())),
    "as another": lambda x, p, q: F.linear(x.type_as(q), p.type_as(x)) * q[0].view_as(p[0]),
    "in a list": lambda x, p, q: torch.einsum("ni,oi->no", [x, p.exp()]),
    "three factors": lambda x, p, q: torch.linalg.multi_dot([x, p.exp(), q]) + x @ p,
    "twice in one call": lambda x, p, q: torch.addcmul(x, x * p[0].exp(), p[0].exp()) @ q,
    "several outputs": lambda x, p, q: torch.cat(
        [*torch.var_mean(F.linear(x, p.sin()), 1, keepdim=True), (x @ q).amax(1, True)], 1
    ),
    "joined": lambda x, p, q: torch.cat([x, p[:1].sin().expand_as(x), x * q[0]], 1)[:, 2:5],
    "gathered by the inputs": lambda x, p, q: p.exp()[x.argmax(1)] + x * q[0],
    "a power": lambda x, p, q: x.abs().pow(p[0].exp()) + p[1].exp().pow(x) * q[0],
    "bounds": lambda x, p, q: x.clamp(-p[0].exp(), q[0].exp()),
    "both operands of a norm": lambda x, p, q: F.linear(F.layer_norm(x, (3,), p[0], p[0]), q),
    "distances": lambda x, p, q: -((x[:, None] - p[None]) ** 2).sum(-1) * q.sum(),
    "inside a map": lambda x, p, q: vmap(lambda row: p.exp() @ row)(x) + x @ p,
    "mapped over": lambda x, p, q: vmap(lambda w: (x @ w).tanh())(torch.stack([p, q])).sum(0),
    "an empty part": lambda x, p, q: F.linear(x, torch.cat([p, q[:0]])) + x @ q,
}


@pytest.mark.parametrize("name", USED)
def test_met_in_several_ways(name: str) -> None:
    torch.manual_seed(0)
    holds(Applied(USED[name], (3, 3), (3, 3)).double(), data(3), "exact")


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def symmetric() -> nn.Module:
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 3))


def orthogonal(how: str) -> nn.Module:
    layer = parametrizations.orthogonal(nn.Linear(3, 4), orthogonal_map=how)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3))


class Functional(nn.Module):
    """A layer called with other weights than its own, and once more with its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.delta = nn.Linear(3, 3), nn.Parameter(torch.zeros(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        own = {"weight": self.layer.weight + self.delta.sin(), "bias": self.layer.bias * 2}
        return functional_call(self.layer, own, (x,)) + self.layer(x).tanh()


class Ensemble(nn.Module):
    """Members run at once, their parameters stacked in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        named = [dict(member.named_parameters()) for member in self.members]
        stacked = {name: torch.stack([each[name] for each in named]) for name in named[0]}
        return vmap(lambda p: functional_call(self.members[0], p, (x,)).tanh())(stacked).mean(0)


class Window(nn.Module):
    """Attention over 2 x 2 windows with a bias of relative positions, learned or computed."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.table, self.scale = nn.Parameter(torch.zeros(9, 2)), nn.Parameter(torch.zeros(2, 1, 1))
        self.make = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2, bias=False))
        self.packed, self.read, self.computed = nn.Linear(4, 12), nn.Linear(4, 3), computed
        at = torch.stack(torch.meshgrid(*[torch.arange(2)] * 2, indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None] + 1
        self.register_buffer("index", apart[0] * 3 + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.packed(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind(0)
        table = self.make(torch.linspace(-1, 1, 18).double().view(9, 2)) if self.computed else None
        table = self.table if table is None else 16 * table.sigmoid()
        bias = table[self.index.view(-1)].view(4, 4, 2).permute(2, 0, 1).contiguous()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        scores = scores * self.scale.clamp(max=4.6).exp() + bias
        return self.read((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).tanh().mean(1)


class Positions(nn.Module):
    """Positions that are normed and read twice, and a bias by distance, to the present length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.bias = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Embedding(5, 1)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        x = self.norm(self.embed(at)) + x + 0.1 * self.embed.weight[: x.shape[1]]
        bias = self.bias((at[:, None] - at).clamp(-2, 2) + 2)[..., 0]
        return self.read((x @ x.mT + bias).softmax(-1) @ x).mean(1)


class Recurrent(nn.Module):
    """A layer with a learned first state, and a loop with made weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.first = nn.GRU(4, 4, batch_first=True), nn.Parameter(torch.zeros(1, 1, 4))
        self.own = nn.Parameter(torch.zeros(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.layer(x, self.first.tanh().expand(1, len(x), 4).contiguous())
        transition = self.own @ self.own.t()
        last = reduce(lambda h, t: (h @ transition + t).tanh(), x.unbind(1), x[:, 0] * 0)
        return last @ self.own


class MadeConvolutions(nn.Module):
    """A filter that mirrors itself, in all four directions; a filter for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.apart = (
            nn.Parameter(torch.zeros(1, 1, 3, 3)),
            nn.Conv2d(4, 4, 3, groups=4),
        )
        self.norm, self.read = nn.GroupNorm(2, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        filters = self.turned + self.turned.flip(-1)
        all_four = torch.cat([filters.rot90(k, (2, 3)) for k in range(4)])
        x = self.norm(F.conv2d(x, all_four, padding=1)).tanh()
        x = F.conv2d(x, self.apart.weight.abs(), self.apart.bias * 2, groups=4)
        return self.read(x.flatten(1))


class KeepsWeights(nn.Module):
    """Keeps what it has made of a parameter from one run to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.zeros(3, 3)), {}

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.kept.get("of") is not self.weight:
            self.kept = {"of": self.weight}
        made = self.kept.setdefault("made", self.weight.t().contiguous() + 1)
        return x @ made * made[0]


MODULES: dict[str, tuple[Callable[[], nn.Module], list[Batch]]] = {
    "symmetric": (symmetric, data(3)),
    "matrix_exp": (lambda: orthogonal("matrix_exp"), data(3)),
    "cayley": (lambda: orthogonal("cayley"), data(3)),
    "householder": (lambda: orthogonal("householder"), data(3)),
    "one norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 3), dim=None), data(3)),
    "norms of columns": (lambda: parametrizations.weight_norm(nn.Linear(3, 3), dim=1), data(3)),
    "functional": (Functional, data(3)),
    "ensemble": (Ensemble, data(3)),
    "window": (lambda: Window(False), data(4, 4)),
    "window, computed bias": (lambda: Window(True), data(4, 4)),
    "positions": (Positions, sequences(4)),
    "recurrent": (Recurrent, sequences(4)),
    "convolutions": (MadeConvolutions, data(1, 4, 4)),
    "keeps weights": (KeepsWeights, data(3)),
}


@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_that_make_their_weights(name: str, fisher_type: str) -> None:
    make, batches = MODULES[name]
    holds(double(make), batches, fisher_type)
