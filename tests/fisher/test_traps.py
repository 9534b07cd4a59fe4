"""Hooks, checkpoints, writes in place, inner derivatives, sampled targets, autocast."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn

from ewc import EWC, Classification, Custom
from tests import oracle
from tests.architectures import Checkpointed
from tests.oracle import nll
from tests.support.asserts import assert_close
from tests.support.collecting import collected

TYPES = ["empirical", "mc"]

pytestmark = pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning")


class Given(Custom):
    """Its samples do not depend on chance, so that the sampled Fisher is known."""

    def __init__(self) -> None:
        super().__init__(nll, sample=lambda outputs: outputs.argmin(1))


def data(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(6, *shape).double(), torch.randint(3, (6,))


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def check(
    net: nn.Module, inputs: Any, targets: Tensor, fisher_type: str, names: list[str] | None = None
) -> dict[str, str]:
    """Collection equals the oracle; which path each parameter took."""
    protected = dict(net.named_parameters())
    names = list(protected) if names is None else names
    found = EWC(net, Given(), parameters=names, fisher_type=fisher_type)
    summary = found.consolidate([(inputs, targets)])

    def losses(net: nn.Module, n: int) -> Tensor:
        one = oracle.one(inputs, n)
        outputs = net(*one) if isinstance(one, tuple) else net(one)
        given = targets[n : n + 1] if fisher_type == "empirical" else outputs.argmin(1).detach()
        return nll(outputs, given)

    expected = oracle.squares(net, losses, 6, names)
    assert_close(found.fisher, {name: each / 6 for name, each in expected.items()}, 1e-9)
    return dict(summary.paths)


@pytest.mark.parametrize("fisher_type", TYPES)
def test_unprotected_parameters_before_protected_ones(fisher_type: str) -> None:
    paths = check(layers(), *data(4), fisher_type, ["2.weight", "2.bias"])
    assert set(paths.values()) == {"rule"}


@pytest.mark.parametrize("fisher_type", TYPES)
def test_inputs_that_require_a_gradient(fisher_type: str) -> None:
    x, y = data(4)
    paths = check(layers(), x.requires_grad_(), y, fisher_type)
    assert set(paths.values()) == {"rule"}
    assert x.grad is None


@pytest.mark.filterwarnings("ignore:`torch.jit.")
@pytest.mark.parametrize("fisher_type", TYPES)
def test_a_parameter_that_goes_by_loop_before_others(fisher_type: str) -> None:
    net = layers()
    net[0] = torch.jit.script(net[0])
    paths = check(net, *data(4), fisher_type)
    assert paths["2.weight"] in ("rule", "loop")


class Energy(nn.Module):
    """Differentiates inside, as force fields do."""

    def __init__(self, *, by_backward: bool = False) -> None:
        super().__init__()
        self.energy, self.read = nn.Linear(4, 5), nn.Linear(4, 3)
        self.by_backward = by_backward

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.energy(x).tanh().sum()
        if self.by_backward:
            energy.backward(inputs=[x], create_graph=True)
            return self.read(x.grad)
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return self.read(force)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("by_backward", [False, True])
def test_a_model_that_differentiates(by_backward: bool, fisher_type: str) -> None:
    torch.manual_seed(0)
    check(Energy(by_backward=by_backward).double(), *data(4), fisher_type)


@pytest.mark.parametrize("fisher_type", TYPES)
def test_a_backward_hook_on_a_module(fisher_type: str) -> None:
    net = layers()
    net[1].register_full_backward_hook(lambda module, into, out: (into[0] * 2,))
    check(net, *data(4), fisher_type)


@pytest.mark.parametrize("fisher_type", TYPES)
def test_row_20_hooks_on_parameters_are_not_run_and_stay(fisher_type: str) -> None:
    net, before = layers(), layers().state_dict()
    calls = []

    def step(gradient: Tensor) -> Tensor:
        calls.append(gradient)
        with torch.no_grad():
            net[2].weight.sub_(gradient)
        return gradient * 3

    handles = [net[2].weight.register_hook(step)]
    net[0].bias.register_post_accumulate_grad_hook(calls.append)
    paths = check(net, *data(4), fisher_type)
    assert set(paths.values()) == {"rule"}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not calls
    nll(net(data(4)[0]), data(4)[1]).sum().backward()
    assert len(calls) == 2
    for handle in handles:
        handle.remove()
    nll(net(data(4)[0]), data(4)[1]).sum().backward()
    assert len(calls) == 3


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.table[x].sum(1))


@pytest.mark.parametrize("fisher_type", TYPES)
def test_a_parameter_indexed_by_the_inputs(fisher_type: str) -> None:
    torch.manual_seed(0)
    paths = check(Table().double(), torch.randint(5, (6, 3)), data(4)[1], fisher_type)
    assert "loop" not in paths.values()


class Padded(nn.Module):
    """PyTorch's encoder looks whether it could use nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.read = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        out = self.encoder(x, src_key_padding_mask=padding)
        return self.read(out.masked_fill(padding.unsqueeze(2), 0).sum(1))


@pytest.mark.parametrize("fisher_type", TYPES)
def test_a_transformer_encoder_with_padding(fisher_type: str) -> None:
    torch.manual_seed(0)
    x, y = data(5, 8)
    padding = torch.arange(5) >= torch.tensor([5, 3, 1, 4, 5, 2]).unsqueeze(1)
    paths = check(Padded().double(), (x, padding), y, fisher_type)
    assert set(paths.values()) == {"rule"}


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.read = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(x, lengths.cpu(), True, enforce_sorted=False)
        return self.read(self.rnn(packed)[1][-1])


@pytest.mark.parametrize("fisher_type", TYPES)
def test_sequences_packed_in_forward(fisher_type: str) -> None:
    torch.manual_seed(0)
    x, y = data(5, 4)
    check(Packed().double(), (x, torch.tensor([5, 3, 1, 4, 5, 2])), y, fisher_type)


@pytest.mark.parametrize("fisher_type", TYPES)
def test_row_40_checkpoints(fisher_type: str) -> None:
    torch.manual_seed(0)
    paths = check(Checkpointed(first=nn.Linear(4, 4)).double(), *data(4), fisher_type)
    assert set(paths.values()) == {"rule"}


def test_a_wrong_rule_is_detected_for_sampled_targets_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ewc.fisher import Sum
    from ewc.fisher.rules import registry

    def wrong(op: Any, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = op.samples(input)
        out = F.linear(x, op.value(weight), op.value(bias))
        return op.record(out, {bias: lambda g: Sum(2 * g)})

    monkeypatch.setitem(registry.RULES, F.linear, wrong)
    paths = check(layers(), *data(4), "mc")
    assert set(paths.values()) == {"loop"}


def test_sampled_targets_where_the_outputs_are_no_tensor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"a": self.a(x), "more": (self.b(x).tanh(), "text", None)}

    torch.manual_seed(0)
    net, (x, y) = Two().double(), data(4)
    likelihood = Custom(
        lambda outputs, t: nll(outputs["a"], t) + outputs["more"][0].sum(1),
        sample=lambda outputs: outputs["a"].argmin(1),
    )
    found = collected(net, [(x, y)], likelihood=likelihood, fisher_type="mc")

    def losses(net: nn.Module, n: int) -> Tensor:
        outputs = net(x[n : n + 1])
        return nll(outputs["a"], outputs["a"].argmin(1)) + outputs["more"][0].sum(1)

    assert_close(found.sums, oracle.squares(net, losses, 6), 1e-9)
    assert set(found.paths.values()) == {"rule"}


def test_sampled_targets_where_the_outputs_are_an_object() -> None:
    class Density(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> torch.distributions.Distribution:
            return torch.distributions.Independent(torch.distributions.Normal(self.mean(x), 2.0), 1)

    net, (x, y) = Density().double(), data(4)
    likelihood = Custom(lambda density, t: -density.log_prob(t), sample=lambda d: d.sample())
    found = collected(net, [(x, y)], likelihood=likelihood, fisher_type="mc")
    assert set(found.paths.values()) == {"rule"}

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            outputs = self.inner(x)
            return lambda: outputs

    likelihood = Custom(lambda f, t: nll(f(), t), sample=lambda f: f().argmin(1))
    found = collected(Hidden().double(), [(x, y)], likelihood=likelihood, fisher_type="mc")
    assert set(found.paths.values()) == {"loop"}


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize(
    "write",
    [lambda x: x.sub_(1), lambda x: x.relu_(), lambda x: x[:, 0].mul_(2)],
    ids=["sub_", "relu_", "part"],
)
def test_a_model_that_writes_into_its_inputs(write: Any, fisher_type: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            write(x)
            return self.layer(x) * scale.mul_(2)

    torch.manual_seed(0)
    net, (x, y) = Writes().double(), data(4)
    before, scale = x.clone(), torch.ones(()).double()
    ewc = EWC(net, Given(), fisher_type=fisher_type)
    summary = ewc.consolidate([((x, scale), y)])
    assert torch.equal(x, before)
    assert scale == 1

    def losses(net: nn.Module, n: int) -> Tensor:
        outputs = net(x[n : n + 1].clone(), scale.clone())
        return nll(outputs, y[n : n + 1] if fisher_type == "empirical" else outputs.argmin(1))

    expected = oracle.squares(net, losses, 6)
    assert_close(ewc.fisher, {name: each / 6 for name, each in expected.items()}, 1e-9)
    assert set(summary.paths.values()) == {"rule"}


def test_a_transform_that_writes_into_the_targets() -> None:
    x, y = data(4)
    shifted = Classification(target_transform=lambda t: t.sub_(1))
    given = y + 1
    found = collected(layers(), [(x, given)], likelihood=shifted)
    assert torch.equal(given, y + 1)
    assert_close(found.sums, oracle.empirical(layers(), (x, y), nll), 1e-9)


def test_sampled_classes_go_by_rule() -> None:
    summary = EWC(layers(), Classification(), fisher_type="mc").consolidate([data(4)])
    assert set(summary.paths.values()) == {"rule"}


class Rough(nn.Module):
    """Rounds as bfloat16 does, another way in each size of batch."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float()) * (1 + self.error * x.shape[0])


def test_row_24_rounding_is_not_taken_for_mixing() -> None:
    x, y = data(4)
    with torch.autocast("cpu", torch.bfloat16):
        EWC(Rough(0.02), Classification()).consolidate([(x.float(), y)])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="mixes"):
        EWC(Rough(1.0), Classification()).consolidate([(x.float(), y)])
    with pytest.raises(ValueError, match="mixes"):
        EWC(Rough(0.02), Classification()).consolidate([(x.float(), y)])


def test_row_24_autocast_keeps_the_rules() -> None:
    class Mixed(nn.Module):
        """Factors of different types: the input in float32, the gradient in bfloat16."""

        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.tied = nn.Parameter(torch.randn(4, 4) / 2)
            self.stacked = nn.Parameter(torch.randn(4, 4, 3) / 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.grouped(x).mean(3).float() + x[..., 0]
            x = (x @ self.tied).float() + torch.sin(x) @ self.tied.t()
            return torch.einsum("nci,cio->no", x, self.stacked)

    def autocast(net: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = net(batch[0])
            return out

    torch.manual_seed(0)
    net, inputs, targets = Mixed(), torch.randn(6, 4, 4, 4), torch.randint(3, (6,))
    found = collected(net, [(inputs, targets)], forward=autocast)
    assert set(found.paths.values()) == {"rule"}, found.paths

    def losses(net: nn.Module, n: int) -> Tensor:
        return nll(autocast(net, (inputs[n : n + 1],)).float(), targets[n : n + 1])

    for name, expected in oracle.squares(net, losses, 6).items():
        error = (found.sums[name].double() - expected).norm() / expected.norm()
        assert error < 0.05, (name, error)


class HooksItself(nn.Module):
    """Registers a hook in its first run, as models of transformers do that return hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.is_hooked = nn.Linear(4, 5), nn.Linear(5, 3), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_hooked:
            self.first.register_forward_hook(lambda module, args, output: output + 1)
            self.first.register_forward_pre_hook(
                lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
            )
            self.is_hooked = True
        return self.last(self.first(x).tanh())


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("has_run", [False, True])
def test_hooks_that_the_first_run_registers(fisher_type: str, has_run: bool) -> None:
    torch.manual_seed(0)
    net, (x, y) = HooksItself().double(), data(4)
    if has_run:
        net(x)
    hooks = {**net.first._forward_hooks, **net.first._forward_pre_hooks}
    assert set(check(net, x, y, fisher_type).values()) == {"rule"}
    assert {**net.first._forward_hooks, **net.first._forward_pre_hooks} == hooks
    assert net.is_hooked == has_run
