"""Rows 44 and 45: every way in which a training step differentiates the penalty."""

import copy
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from ewc import EWC, Classification, OnlineEWC, ReplacedParameterWarning
from tests.support.asserts import raises
from tests.support.tasks import (
    CLASSES,
    as_task,
    grow,
    make,
    make_model,
    make_task,
    shift,
    written_out,
)


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def exact(ewc, model):
    """The gradients of the penalty by their formula, in float64."""
    fisher, anchor = as_task(ewc)
    return [
        ewc.strength * fisher[name].double() * (p.detach().double() - anchor[name].double())
        for name, p in model.named_parameters()
    ]


def assert_gradients(found, expected, factor=1.0):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), factor * other.double(), rtol=1e-4, atol=1e-8)


def test_row_44_two_penalties(kind):
    model, ewc = make(kind, strength=3.0)
    one, other = ewc(), ewc()
    one.backward()
    assert_gradients(gradients(model), exact(ewc, model))
    other.backward()
    assert_gradients(gradients(model), exact(ewc, model), 2)


def test_row_44_backward_twice_through_one_graph(kind):
    model, ewc = make(kind)
    penalty = ewc()
    penalty.backward(retain_graph=True)
    penalty.backward()
    assert_gradients(gradients(model), exact(ewc, model), 2)
    with raises(RuntimeError, "second time"):
        penalty.backward()
    assert_gradients(gradients(model), exact(ewc, model), 2)


def test_row_44_gradient_accumulation(kind):
    model, ewc = make(kind)
    tasks = make_task(2, batches=4)
    for x, y in tasks:
        ((F.cross_entropy(model(x), y) + ewc()) / len(tasks)).backward()
    found = gradients(model)
    model.zero_grad()
    x, y = (torch.cat(parts) for parts in zip(*tasks, strict=True))
    (F.cross_entropy(model(x), y) + ewc()).backward()
    assert_gradients(found, gradients(model))


def test_row_44_create_graph(kind):
    model, ewc = make(kind, strength=3.0)
    parameters = list(model.parameters())
    first = torch.autograd.grad(ewc(), parameters, create_graph=True)
    norm = sum((gradient**2).sum() for gradient in first)
    for parameter, name in zip(parameters, ewc.fisher, strict=True):
        (second,) = torch.autograd.grad(norm, parameter, retain_graph=True)
        distance = (parameter - ewc.anchor[name]).detach()
        torch.testing.assert_close(second, 2 * (3.0 * ewc.fisher[name]) ** 2 * distance)


@pytest.mark.parametrize("retain_graph", [False, True])
def test_row_44a_a_step_between_penalty_and_backward(kind, retain_graph):
    model, ewc = make(kind)
    expected = exact(ewc, model)
    penalty = ewc()
    shift(model, 7)
    penalty.backward(retain_graph=retain_graph)
    assert_gradients(gradients(model), expected)  # those of the forward, as they must be
    if retain_graph:
        # Formed anew, it would be the gradient of other parameters.
        with raises(RuntimeError, "modified by an inplace operation"):
            penalty.backward()
        assert_gradients(gradients(model), expected)


def test_row_44a_create_graph_after_a_step(kind):
    model, ewc = make(kind)
    penalty = ewc()
    shift(model, 7)
    with raises(RuntimeError, "modified by an inplace operation"):
        torch.autograd.grad(penalty, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("scale", [2.0**16, 1.0])
def test_row_44b_gradient_scaling(kind, scale):
    model, ewc = make(kind)
    (x, y), *_ = make_task(3)
    (F.cross_entropy(model(x), y) + ewc()).backward()
    expected = gradients(model)
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        loss = F.cross_entropy(model(x), y) + ewc()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert_gradients(gradients(model), expected)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    for p, old, gradient in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * gradient)


def test_row_44b_gradient_scaling_of_half_precision(kind):
    model, ewc = make(kind, strength=1e-4)
    model.half()
    expected = exact(ewc, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(ewc()).backward()
    # Unscaled, most of these gradients would be 0 in float16.
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad.dtype is torch.float16
        error = (parameter.grad.double() / 2.0**12 - gradient).norm()
        assert error < 1e-2 * gradient.norm()


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str
)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_row_44c_every_form_of_an_optimizer(kind, optimizer, options):
    def trained(options):
        model, ewc = make(kind, strength=50.0)
        steps = optimizer(model.parameters(), lr=1e-2, **options)
        penalties = []
        for x, y in make_task(5, batches=4):
            steps.zero_grad()
            penalty = ewc()
            (F.cross_entropy(model(x), y) + penalty).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            steps.step()
            penalties.append(penalty.item())
            expected = written_out([as_task(ewc)], model, 50.0).item()
            assert ewc().item() == pytest.approx(expected, rel=1e-4)
        return penalties

    assert trained(options) == pytest.approx(trained({"foreach": False}), rel=1e-4)


def test_row_44c_an_optimizer_with_a_closure(kind):
    model, ewc = make(kind, strength=50.0)
    (x, y), *_ = make_task(5)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + ewc()
        loss.backward()
        return loss

    first = closure().item()
    optimizer.step(closure)
    assert closure().item() < first


class Penalised(nn.Module):
    """A model whose output is the penalty, so that its parameters can be handed in."""

    def __init__(self, model, ewc):
        super().__init__()
        self.model, self.ewc = model, ewc

    def forward(self):
        return self.ewc()


def test_row_44d_functional_call(kind):
    model, ewc = make(kind)
    whole = Penalised(model, ewc)
    here = ewc().item()
    handed = {n: (p.detach() + 0.1).requires_grad_() for n, p in whole.named_parameters()}
    penalty = functional_call(whole, handed, ())
    fisher, anchor = as_task(ewc)
    expected = (
        0.5
        * ewc.strength
        * sum(
            (fisher[name] * (handed[f"model.{name}"] - anchor[name]) ** 2).sum() for name in fisher
        )
    )
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(penalty, list(handed.values()))
    assert_gradients(found, torch.autograd.grad(expected, list(handed.values())))
    assert ewc().item() == here
    plain = {name: one.detach() for name, one in handed.items()}
    transformed = torch.func.grad(lambda given: functional_call(whole, given, ()))(plain)
    assert_gradients([transformed[name] for name in handed], found)
    assert ewc().item() == here


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("kind", "options", "backend"),
    [
        (EWC, {}, "eager"),
        (EWC, {}, "aot_eager"),
        (OnlineEWC, {"decay": 0.9, "prior_precision": 0.1}, "aot_eager"),
    ],
)
def test_row_45_same_value_and_gradient(kind, options, backend):
    model = make_model()
    ewc = kind(model, Classification(), **options)
    (x, y), *_ = make_task(5)

    def step():
        return F.cross_entropy(model(x), y) + ewc()

    def check():
        found = compiled()
        expected = step()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, list(model.parameters())),
            torch.autograd.grad(expected, list(model.parameters())),
        )

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    check()
    for seed in range(2):
        ewc.consolidate(make_task(seed))
        shift(model, seed)
        check()
    for strength in (2.0, 0.0):
        ewc.strength = strength
        check()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_row_45_a_whole_step_under_autocast(kind, backend):
    model, ewc = make(kind)
    (x, y), *_ = make_task(5)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x), y), ewc()

    found, expected = torch.compile(step, fullgraph=True, backend=backend)(), step()
    assert found[1].dtype is torch.float32
    assert found[1].item() == pytest.approx(expected[1].item(), rel=1e-5)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found[1], parameters), torch.autograd.grad(expected[1], parameters)
    )


@pytest.mark.usefixtures("compiler")
def test_row_45_follows_a_replaced_and_a_grown_parameter(kind):
    model, ewc = make(kind)
    compiled = torch.compile(lambda: ewc(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(), ewc())
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1.0)
    with pytest.warns(ReplacedParameterWarning, match="0.weight"):
        expected = ewc()
    torch.testing.assert_close(compiled(), expected)
    grow(model)
    torch.testing.assert_close(compiled(), ewc())


@pytest.mark.usefixtures("compiler")
def test_row_45_after_deepcopy_and_of_a_compiled_model(kind):
    model = make_model()
    wrapped = torch.compile(model, backend="aot_eager")
    ewc = kind(wrapped, Classification())
    ewc.consolidate(make_task())
    shift(model)
    expected = ewc().item()
    other = copy.deepcopy(ewc)
    compiled = torch.compile(lambda: other(), fullgraph=True, backend="aot_eager")
    assert compiled().item() == pytest.approx(expected)


@pytest.mark.usefixtures("compiler")
def test_row_45_tasks_and_strengths_do_not_compile_anew():
    counter = torch._dynamo.testing.CompileCounter()
    model, ewc = make(EWC, n_tasks=0)
    compiled = torch.compile(lambda: ewc(), fullgraph=True, backend=counter)
    for seed in range(12):
        ewc.consolidate(make_task(seed))
        shift(model, seed)
        torch.testing.assert_close(compiled(), ewc())
    for strength in (2.0, 3.0, 0.0, 1.0, 7.0):
        ewc.strength = strength
        compiled()
    # The first task, a first change of the constants, a first change of the strength.
    assert counter.frame_count <= 3


@pytest.mark.usefixtures("compiler")
def test_row_45a_a_parameter_gone_inside_a_compiled_step(kind):
    model, ewc = make(kind)
    compiled = torch.compile(lambda: ewc(), backend="eager")
    compiled()
    model[2] = nn.Linear(7, CLASSES - 1)
    with raises(ValueError, "'2.weight' has changed its shape", "forget("):
        compiled()
