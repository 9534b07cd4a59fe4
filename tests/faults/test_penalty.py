"""Rows 6 to 8: where the penalty is 0, and where it must not be."""

import copy

import pytest
import torch
from torch.nn import functional as F

from ewc import Classification
from tests.support.tasks import INPUTS, make, make_model, make_task, shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_row_06_before_the_first_consolidation(kind, dtype):
    model = make_model(dtype=dtype)
    penalty = kind(model, Classification())()
    assert penalty.item() == 0.0
    assert penalty.shape == ()
    assert penalty.device == model[0].weight.device
    assert penalty.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    (model(torch.ones(1, INPUTS, dtype=dtype)).sum() + penalty).backward()
    assert model[0].weight.grad is not None


def test_row_06_backward_on_it_alone(kind):
    model = make_model()
    ewc = kind(model, Classification())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    before = copy.deepcopy(model.state_dict())
    model[0].weight.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())
    for scaled in (ewc(), 3 * ewc(), ewc() + ewc()):
        scaled.backward()
    ewc().backward(retain_graph=True)
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    given = torch.ones_like(model[0].bias)
    model[0].bias.grad = given
    ewc().backward()
    assert model[0].bias.grad is given
    assert torch.equal(given, torch.ones(7))


def test_row_06_is_like_a_penalty(kind):
    model = make_model()
    ewc = kind(model, Classification())
    penalty = ewc()
    penalty += 1.0  # in place, as on one that is not 0
    penalty.backward()
    with torch.no_grad():
        assert not ewc().requires_grad
    with torch.inference_mode():
        assert ewc().item() == 0.0
    assert torch.func.grad(lambda x: (x**2).sum() + ewc())(torch.ones(2)).tolist() == [2.0, 2.0]
    assert torch.func.vmap(lambda x: x + ewc())(torch.ones(2)).tolist() == [1.0, 1.0]
    (gradient,) = torch.autograd.grad(ewc(), model[0].weight, allow_unused=True)
    assert gradient is None
    model.requires_grad_(False)
    ewc().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_row_06_in_a_compiled_step(kind, backend):
    model = make_model()
    ewc = kind(model, Classification())
    alone = torch.compile(lambda: ewc(), backend=backend, fullgraph=True)()
    assert alone.item() == 0.0
    alone.backward()
    assert all(p.grad is None for p in model.parameters())
    x = torch.ones(1, INPUTS)
    torch.compile(lambda: model(x).sum() + ewc(), backend=backend, fullgraph=True)().backward()
    found = [p.grad for p in model.parameters()]
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    torch.testing.assert_close(found, list(expected))
    with torch.no_grad():
        assert not torch.compile(lambda: ewc(), backend=backend, fullgraph=True)().requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_row_06_on_the_parameters_device(kind):
    penalty = kind(make_model().cuda(), Classification())()
    assert penalty.is_cuda
    assert penalty.item() == 0.0


def test_row_07_at_the_anchor_of_one_task(kind):
    model = make_model()
    ewc = kind(model, Classification(), strength=1e6)
    ewc.consolidate(make_task())
    assert ewc().item() == 0.0
    ewc().backward()
    assert not any(p.grad.any() for p in model.parameters())


def test_row_07_at_the_anchor_of_many_tasks(kind):
    # `EWC` keeps all anchors: only where these agree is it 0.
    model = make_model()
    online = kind.__name__ == "OnlineEWC"
    options = {"decay": 0.9, "prior_precision": 0.1} if online else {}
    ewc = kind(model, Classification(), **options)
    for seed in range(3):
        if online:
            shift(model, seed)
        ewc.consolidate(make_task(seed))
        assert ewc().item() == 0.0
        model.zero_grad()
        ewc().backward()
        assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_row_08_after_an_optimizers_step_in_place(kind, optimizer):
    model, ewc = make(kind, n_tasks=0)
    steps = optimizer(model.parameters(), lr=0.1)
    ewc.consolidate(make_task())
    anchor = ewc.anchor
    pointers = {p.data_ptr() for p in model.parameters()}
    (x, y), *_ = make_task(1)
    F.cross_entropy(model(x), y).backward()
    steps.step()
    assert {p.data_ptr() for p in model.parameters()} == pointers
    assert ewc().item() > 0.0
    assert all(torch.equal(one, anchor[name]) for name, one in ewc.anchor.items())
