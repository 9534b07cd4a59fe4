"""What holds for any model, likelihood, type of Fisher, split into batches and dtype.

The examples are fixed (`derandomize`): a failure on one machine is a failure on all.
"""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ewc import EWC, Classification, Custom, OnlineEWC, Regression
from tests import oracle
from tests.architectures import CASES, build
from tests.support.asserts import assert_close, unchanged
from tests.support.tasks import make_model, make_task, same_state, shift, written_out

pytestmark = pytest.mark.filterwarnings(
    "ignore::ewc.SlowPathWarning",
    "ignore::ewc.ZeroFisherWarning",
    "ignore:LSTM with projections is not supported with oneDNN",
)
FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)
MORE = settings(FEW, max_examples=80)

# Gradients that are not per sample, or complex outputs; `tests/fisher` has tests of both.
MODELS = sorted(set(CASES) - {"embedding by frequency", "complex"})


def poisson(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.exp() - outputs * targets).sum(1)


def losses(kind: str, fisher_type: str, outputs: Tensor, target: Tensor) -> Tensor:
    """The terms of one sample, `[K]`, by definition."""
    if kind == "classification":
        log_p = outputs.log_softmax(1)[0]
        if fisher_type == "exact":
            return log_p.detach().exp().sqrt() * -log_p
        return -log_p[target]
    if kind == "regression":
        if fisher_type == "exact":
            return outputs[0] / 0.5**0.5
        return ((outputs - target) ** 2).sum(1) / (2 * 0.5)
    return poisson(outputs, target)


LIKELIHOODS = {
    "classification": Classification(),
    "regression": Regression(0.5),
    "custom": Custom(poisson),
}


@MORE
@given(
    name=st.sampled_from(MODELS),
    kind=st.sampled_from(sorted(LIKELIHOODS)),
    exact=st.booleans(),
    online=st.booleans(),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_fisher_equals_the_oracle(
    name: str,
    kind: str,
    exact: bool,
    online: bool,
    sizes: list[int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    fisher_type = "exact" if exact and kind != "custom" else "empirical"
    samples = sum(sizes)
    model, inputs, targets = build(CASES[name], samples, dtype, seed)
    if kind != "classification":
        targets = torch.randn(samples, CASES[name].classes, dtype=dtype)
        targets = targets.abs() if kind == "custom" else targets

    def of_one(net: nn.Module, n: int) -> Tensor:
        x = oracle.one(inputs, n)
        outputs = net(*x) if isinstance(x, tuple) else net(x)
        return losses(kind, fisher_type, outputs, targets[n : n + 1])

    expected = oracle.squares(model, of_one, samples)
    before = copy.deepcopy(model)
    ewc = (OnlineEWC if online else EWC)(model, LIKELIHOODS[kind], fisher_type=fisher_type)

    def split(value: Any) -> list[Any]:
        if isinstance(value, tuple):
            return list(zip(*(part.split(sizes) for part in value), strict=True))
        return list(value.split(sizes))

    ewc.consolidate(zip(split(inputs), targets.split(sizes), strict=True))
    right = {key: one / samples for key, one in expected.items()}
    assert_close(ewc.fisher, right, 1e-9 if dtype is torch.float64 else 1e-3)
    for one, other in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def tasks_of(model: nn.Module, n_tasks: int, seed: int) -> list[list[tuple[Tensor, Tensor]]]:
    dtype = next(model.parameters()).dtype
    return [
        [(x.to(dtype), y) for x, y in make_task(seed + task, batches=1, size=3)]
        for task in range(n_tasks)
    ]


@FEW
@given(
    n_tasks=st.integers(1, 8),
    seed=st.integers(0, 2**16),
    strength=st.floats(0, 1e6),
    step=st.floats(1e-3, 1.0),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_merged_tasks_equal_the_explicit_sum(
    n_tasks: int, seed: int, strength: float, step: float, dtype: torch.dtype
) -> None:
    model = make_model(seed, dtype=dtype)
    ewc = EWC(model, Classification(), strength=strength)
    tasks = []
    for number, task in enumerate(tasks_of(model, n_tasks, seed)):
        shift(model, seed + number, step)
        ewc.consolidate(task)
        alone = EWC(model, Classification())
        alone.consolidate(task)
        tasks.append((alone.fisher, alone.anchor))
    shift(model, seed + n_tasks, step)
    expected = written_out(tasks, model, strength)
    tolerance = 1e-11 if dtype is torch.float64 else 1e-4
    assert ewc().item() == pytest.approx(expected.item(), rel=tolerance)
    found = torch.autograd.grad(ewc(), list(model.parameters()))
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    norm = sum(float(one.double().norm()) for one in gradients)
    for one, other in zip(found, gradients, strict=True):
        assert (one.double() - other.double()).norm() <= tolerance * norm


@FEW
@given(
    online=st.booleans(),
    n_tasks=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    decay=st.floats(0.1, 1),
    prior=st.floats(0, 10),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    forgotten=st.sets(st.sampled_from(["0.weight", "0.bias", "2.weight"])),
    frozen=st.booleans(),
)
def test_state_round_trips(
    online: bool,
    n_tasks: int,
    seed: int,
    decay: float,
    prior: float,
    dtype: torch.dtype,
    forgotten: set[str],
    frozen: bool,
) -> None:
    def build_object(model: nn.Module) -> EWC:
        if online:
            return OnlineEWC(model, Classification(), decay=decay, prior_precision=prior)
        return EWC(model, Classification())

    model = make_model(seed, dtype=dtype)
    ewc = build_object(model)
    for task in tasks_of(model, n_tasks, seed):
        ewc.consolidate(task)
        shift(model, seed)
    if forgotten:
        ewc.forget(*forgotten)
    other_model = copy.deepcopy(model)
    if frozen:
        other_model[0].requires_grad_(False)
    buffer = io.BytesIO()
    torch.save(ewc.state_dict(), buffer)
    buffer.seek(0)
    other = build_object(other_model)
    with unchanged(None, other_model):
        other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.n_tasks == ewc.n_tasks
    assert same_state(other, ewc.fisher, ewc.anchor)
    assert torch.equal(ewc(), other())
    if not frozen:
        (task,) = tasks_of(model, 1, seed + 9)
        ewc.consolidate(task)
        other.consolidate(task)
        assert same_state(other, ewc.fisher, ewc.anchor)


class Faulty(nn.Module):
    """Runs a model, and something at each run, forward or backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.at: dict[str, Any] = {}

    def forward(self, *inputs: Any) -> Any:
        if "forward" in self.at:
            self.at["forward"]()
        outputs = self.model(*inputs)
        if "backward" in self.at and outputs.requires_grad:
            outputs.register_hook(lambda _: self.at["backward"]())
        return outputs


@MORE
@given(
    name=st.sampled_from(MODELS),
    online=st.booleans(),
    fisher_type=st.sampled_from(["empirical", "exact", "mc"]),
    place=st.sampled_from(["loader", "forward", "likelihood", "backward"]),
    call=st.integers(1, 12),
    error=st.sampled_from([RuntimeError, ValueError, KeyboardInterrupt, TypeError]),
    seed=st.integers(0, 2**16),
)
def test_a_failure_leaves_no_trace(
    name: str,
    online: bool,
    fisher_type: str,
    place: str,
    call: int,
    error: type[BaseException],
    seed: int,
) -> None:
    model, inputs, targets = build(CASES[name], 4, torch.float32, seed)
    model = Faulty(model)
    calls = 0

    def tick() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error("injected")

    class Likelihood(Classification):
        def position_nll(self, head: Tensor, targets: Tensor) -> Tensor:
            if place == "likelihood":
                tick()
            return F.cross_entropy(head, targets, reduction="none")

    def batches() -> Any:
        for n in range(0, 4, 2):
            if place == "loader":
                torch.rand(1)
                tick()
            parts = inputs if isinstance(inputs, tuple) else (inputs,)
            x = tuple(part[n : n + 2] for part in parts)
            yield (x if len(x) > 1 else x[0]), targets[n : n + 2]

    ewc = (OnlineEWC if online else EWC)(model, Likelihood(), fisher_type=fisher_type)
    generator = torch.Generator().manual_seed(seed)
    model.at = {place: tick}
    try:
        with unchanged(ewc, model, generator), pytest.raises(error, match="injected"):
            ewc.consolidate(batches(), generator=generator)
    except pytest.fail.Exception:
        assert calls < call  # the pass was over before
        assert ewc.n_tasks == 1
    else:
        assert calls >= call
        assert ewc.n_tasks == 0
        ewc.consolidate(batches(), generator=generator)  # as if nothing had been
        assert ewc.n_tasks == 1
