"""Every rule on random shapes: odd sizes, dimensions of size one, non-contiguous inputs."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ewc import Custom
from ewc.fisher import Dense, NotCovered, Operation, Outer, decomposition, rule
from ewc.fisher.rules import registry
from tests import oracle
from tests.support.asserts import assert_close
from tests.support.collecting import collected
from tests.support.rules import check, few, loss, noise, seeds, small


@few
@given(small, small, small, st.lists(small, max_size=2), st.booleans(), st.booleans(), seeds)
def test_linear(
    n: int, i: int, o: int, shared: list[int], bias: bool, strided: bool, seed: int
) -> None:
    check(nn.Linear(i, o, bias=bias), noise(seed, n, *shared, i, strided=strided))


@pytest.mark.parametrize("shared", [1, 2, 3, 17])
def test_linear_larger_than_the_cache(shared: int) -> None:
    check(nn.Linear(700, 150), noise(0, 3, shared, 700))


@pytest.mark.parametrize(("i", "o"), [(7, 5), (60, 70), (100, 90), (120, 400)])
@pytest.mark.parametrize("shared", [2, 40, 130])
def test_linear_of_many_positions(i: int, o: int, shared: int) -> None:
    check(nn.Linear(i, o), noise(0, 21, shared, i))


@few
@given(st.data())
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution(dims: int, transposed: bool, data: st.DataObject) -> None:
    groups, wide = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    each = [data.draw(st.tuples(*[st.integers(1, 3)] * dims)) for _ in range(3)]
    kernel, stride, dilation = each
    padding = data.draw(st.tuples(*[st.integers(0, 2)] * dims))
    extra = data.draw(st.tuples(*[st.integers(0, 3)] * dims))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if transposed:
        size = [max(1, more) + 2 * p for more, p in zip(extra, padding, strict=True)]
    else:
        size = [max(1, r + more - 2 * p) for r, more, p in zip(reach, extra, padding, strict=True)]
    kind = "ConvTranspose" if transposed else "Conv"
    net = getattr(nn, f"{kind}{dims}d")(
        2 * groups, wide * groups, kernel, stride, padding, dilation=dilation, groups=groups
    )
    strided = data.draw(st.booleans())
    check(net, noise(data.draw(seeds), data.draw(small), 2 * groups, *size, strided=strided))


def test_convolution_of_larger_images() -> None:
    check(nn.Conv2d(3, 8, 3, padding=1), noise(0, 3, 3, 40, 41))
    check(nn.Conv2d(32, 32, 3, padding=1), noise(0, 5, 32, 9, 8))
    check(nn.Conv2d(32, 48, 3, stride=2, bias=False), noise(0, 5, 32, 9, 8))
    check(nn.Conv2d(16, 8, 1), noise(0, 4, 16, 9, 8))
    check(nn.Conv2d(64, 64, 3, padding=1), noise(0, 3, 64, 9, 8))
    check(nn.Conv2d(8, 12, 3, padding=1), noise(0, 23, 8, 31, 33))
    check(nn.Conv2d(2, 3, 5), noise(0, 70, 2, 12, 11))


class Flat(nn.Module):
    """Integers come as floats, so that the oracle can be shown one input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.long())


@few
@given(small, small, small, st.sampled_from([None, 0, -1]), st.booleans(), seeds)
def test_embedding(
    n: int, rows: int, positions: int, padding: int | None, sparse: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randint(rows, (n, positions))
    check(Flat(nn.Embedding(rows, 3, padding_idx=padding, sparse=sparse)), x.double())


@few
@given(small, small, st.sampled_from(["sum", "mean", "max"]), st.sampled_from([None, 1]), seeds)
def test_embedding_bag(n: int, positions: int, mode: str, padding: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randint(4, (n, positions))
    check(Flat(nn.EmbeddingBag(4, 3, mode=mode, padding_idx=padding)), x.double())


class PackedPositions(nn.Module):
    """Moves positions into the batch dimension, as per-time-step models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@few
@given(small, small, small, seeds, st.booleans())
def test_norms(n: int, c: int, p: int, seed: int, packed: bool) -> None:
    shape = (n, *([2] if packed else []), 2 * c, p)
    for norm in (
        nn.GroupNorm(2, 2 * c),
        nn.InstanceNorm1d(2 * c, affine=True),
        nn.BatchNorm1d(2 * c),
        nn.LayerNorm(p),
        nn.LayerNorm((2 * c, p)),
        nn.RMSNorm(p),
        nn.PReLU(),
        nn.PReLU(2 * c),
    ):
        if isinstance(norm, nn.InstanceNorm1d | nn.GroupNorm) and p * c == 1:
            continue  # PyTorch refuses to normalise a single value
        if isinstance(norm, nn.InstanceNorm1d) and p == 1:
            continue
        check(PackedPositions(norm) if packed else norm, noise(seed, *shape))


@few
@given(
    st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]),
    st.tuples(small, small, small, small),
    st.integers(1, 2),
    st.tuples(*[st.booleans()] * 3),
    seeds,
)
def test_recurrent(
    kind: Any, sizes: tuple[int, ...], layers: int, flags: tuple[bool, ...], seed: int
) -> None:
    n, steps, wide, hidden = sizes
    bidirectional, bias, projected = flags
    options: dict[str, Any] = (
        {"proj_size": 1} if projected and hidden > 1 and kind is nn.LSTM else {}
    )
    net = kind(
        wide, hidden, layers, bias=bias, bidirectional=bidirectional, batch_first=True, **options
    )

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Any:
            out, state = self.net(x)
            states = state if isinstance(state, tuple) else (state,)
            return out, *(each.transpose(0, 1) for each in states)

    check(Outputs(), noise(seed, n, steps, wide))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM, partial(nn.LSTM, proj_size=3)])
@pytest.mark.parametrize("options", [{}, {"bias": False, "bidirectional": True}])
def test_recurrent_under_autocast(kind: Any, options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    net, x = kind(6, 8, 2, batch_first=True, **options), torch.randn(4, 5, 6)
    types = set()

    def nll(outputs: Any) -> Tensor:
        out, state = outputs
        states = [each.transpose(0, 1) for each in (state if isinstance(state, tuple) else [state])]
        types.add((out.dtype, *(each.dtype for each in states)))
        return loss(tuple(each.double() for each in (out, *states)))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            net(x)
        except RuntimeError as refusal:
            if "could not create a primitive descriptor" not in str(refusal):
                raise
            pytest.skip("oneDNN does not run it on this processor")
        found = collected(net, [(x,)], likelihood=Custom(nll))
    assert len(types) == 1  # those of the loop and those of the rule
    assert set(found.paths.values()) == {"rule"}, found.reasons
    assert_close(found.sums, oracle.empirical(net, (x,), nll), 0.05)


@few
@given(small, small, small, small, st.booleans(), seeds)
def test_bilinear(n: int, i: int, j: int, o: int, bias: bool, seed: int) -> None:
    check(nn.Bilinear(i, j, o, bias=bias), (noise(seed, n, 2, i), noise(seed + 1, n, 2, j)))


@few
@given(small, small, small, st.booleans(), st.booleans(), seeds)
def test_attention(n: int, s: int, heads: int, causal: bool, masked: bool, seed: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 2 * heads), nn.Linear(4, 2 * heads)

        def forward(self, x: Tensor) -> Tensor:
            q, k = (each(x).unflatten(2, (heads, 2)).transpose(1, 2) for each in (self.q, self.k))
            mask = (x[:, None, None, :, 0] > -9) if masked and not causal else None
            return F.scaled_dot_product_attention(q, k, k, mask, is_causal=causal)

    check(Net(), noise(seed, n, s, 4))


@pytest.fixture
def kept_registry() -> Any:
    """Leaves the registered rules as they were."""
    rules, decompositions = dict(registry.RULES), dict(registry.DECOMPOSITIONS)
    yield
    registry.RULES.clear()
    registry.RULES.update(rules)
    registry.DECOMPOSITIONS.clear()
    registry.DECOMPOSITIONS.update(decompositions)


class Distances(nn.Module):
    """To prototypes: an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.centres)


def distances(op: Operation, x1: Tensor, x2: Tensor, *, slip: float = 1, **options: Any) -> Tensor:
    x, centres = op.samples(x1), op.value(x2)
    if x.dim() != 3:  # [N, S, 3]
        raise NotCovered
    out = torch.cdist(x, centres)

    def gradient(g: Tensor) -> Dense:
        g = slip * g / out
        return Dense(g.sum(1).unsqueeze(2) * centres - g.mT @ x)

    return op.record(out, {x2: gradient})


@pytest.mark.usefixtures("kept_registry")
def test_a_rule_that_a_user_registers() -> None:
    check(Distances(), noise(0, 4, 3), path="vmap")
    rule(torch.cdist)(distances)
    check(Distances(), noise(0, 4, 3), path="rule")
    check(Distances(), noise(0, 4, 2, 3), path="vmap")


@pytest.mark.usefixtures("kept_registry")
def test_a_wrong_rule_is_detected() -> None:
    rule(torch.cdist)(partial(distances, slip=2))
    check(Distances(), noise(0, 4, 3), path="loop")


@pytest.mark.usefixtures("kept_registry")
def test_a_decomposition_of_the_users_own() -> None:
    @decomposition(torch.cdist)
    def cdist(x1: Tensor, x2: Tensor, **options: Any) -> Tensor:
        return (x1.unsqueeze(-2) - x2).square().sum(-1).sqrt()

    check(Distances(), noise(0, 4, 3), path="rule")
    check(Distances(), noise(0, 4, 2, 3), path="rule")


def test_forms_of_gradients_written_out() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, 4, 2), torch.randn(3, 4, 5)
    total = torch.zeros(5, 2)
    Outer(left, right).add_squares(total.t())
    assert torch.allclose(total.t(), (torch.einsum("nso,nsi->noi", left, right) ** 2).sum(0))
