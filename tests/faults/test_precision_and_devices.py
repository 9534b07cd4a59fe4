"""Rows 24 to 27, 32 and 39: half precision, and more than one device."""

import copy

import pytest
import torch
from torch import nn

from ewc import Classification, OnlineEWC
from tests import oracle
from tests.support.asserts import assert_close, raises
from tests.support.tasks import (
    CLASSES,
    as_task,
    make,
    make_model,
    make_task,
    same_state,
    shift,
    written_out,
)

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def gpu(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
    return pytest.mark.gpu(skip(test))


def task_in(dtype, scale=1.0):
    return [((scale * x).to(dtype), y) for x, y in make_task()]


@HALF
def test_row_24_squares_of_half_precision_do_not_underflow(kind, dtype):
    model = make_model()
    expected = oracle.fisher(model, make_task())
    _, ewc = make(kind, copy.deepcopy(model).to(dtype), n_tasks=0)
    ewc.consolidate(task_in(dtype))
    for name, one in ewc.fisher.items():
        assert one.dtype is torch.float32
        assert (one - expected[name]).norm() < 0.05 * expected[name].norm()
    _, ewc = make(kind, copy.deepcopy(model).to(dtype), n_tasks=0)
    ewc.consolidate(task_in(dtype, 1e-3))
    # Gradients of about 1e-4: their squares are 0 in float16.
    assert 0 < ewc.fisher["0.weight"].mean() < 1e-7
    assert (ewc.fisher["0.weight"] > 0).all()


@HALF
def test_row_24_penalty_of_half_precision_equals_that_of_float32(kind, dtype):
    model = make_model(dtype=dtype)
    ewc = kind(model, Classification())
    ewc.consolidate(task_in(dtype))
    shift(model)
    wide_model = copy.deepcopy(model).float()
    wide = kind(wide_model, Classification())
    wide.load_state_dict(ewc.state_dict())
    assert ewc().dtype is torch.float32
    assert torch.equal(ewc(), wide())
    ewc().backward()
    wide().backward()
    for one, other in zip(model.parameters(), wide_model.parameters(), strict=True):
        assert one.grad.dtype is dtype
        assert torch.equal(one.grad, other.grad.to(dtype))


@HALF
def test_row_24_under_autocast(kind, dtype):
    model, ewc = make(kind, n_tasks=0)
    expected = oracle.fisher(model, make_task())
    with torch.autocast("cpu", dtype=dtype):
        ewc.consolidate(make_task())
    assert all(one.dtype is torch.float32 for one in ewc.fisher.values())
    for name, one in ewc.fisher.items():
        assert (one - expected[name]).norm() < 0.05 * expected[name].norm()
    shift(model)
    outside = ewc()
    with torch.autocast("cpu", dtype=dtype):
        inside = ewc()
        assert torch.is_autocast_enabled("cpu")
    assert inside.dtype is torch.float32
    assert torch.equal(inside, outside)
    found = torch.autograd.grad(inside, list(model.parameters()))
    exact = torch.autograd.grad(outside, list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))


def test_row_25_another_dtype(kind):
    model, ewc = make(kind)
    expected = ewc().item()
    model.double()
    assert ewc().dtype is torch.float64
    assert ewc().item() == pytest.approx(expected, rel=1e-6)
    assert all(one.dtype is torch.float64 for one in ewc.fisher.values())
    model.float()
    assert ewc().dtype is torch.float32
    assert ewc().item() == pytest.approx(expected, rel=1e-6)
    # Once wide, never narrowed.
    assert all(one.dtype is torch.float64 for one in ewc.fisher.values())
    ewc.consolidate(make_task(1))
    assert all(one.dtype is torch.float64 for one in ewc.fisher.values())
    model.bfloat16()
    ewc().backward()


def test_row_25_another_dtype_beside_a_prior():
    prior = {"0.bias": torch.ones(7).double()}
    model = make_model(dtype=torch.bfloat16)
    ewc = OnlineEWC(model, Classification(), prior_precision=prior)
    ewc.consolidate(task_in(torch.bfloat16))
    shift(model)
    assert ewc().dtype is torch.float32
    model.double()
    assert ewc().dtype is torch.float64


@gpu
def test_row_25_another_device(kind):
    model, ewc = make(kind)
    expected = ewc().item()
    model.cuda()
    assert all(one.is_cuda for one in ewc.fisher.values())
    assert ewc().is_cuda
    assert ewc().item() == pytest.approx(expected, rel=1e-5)
    ewc.consolidate(make_task(1))
    assert all(one.is_cuda for one in ewc.anchor.values())
    ewc().backward()
    model.cpu()
    assert not ewc().is_cuda


def test_row_25a_on_the_meta_device(kind):
    model, ewc = make(kind)
    fisher, anchor, state = ewc.fisher, ewc.anchor, ewc.state_dict()
    parameters = {name: one.detach().clone() for name, one in model.named_parameters()}
    expected = ewc().item()
    model.to_empty(device="meta")
    for refused in (
        ewc,
        lambda: ewc.consolidate(make_task()),
        ewc.state_dict,
        lambda: ewc.load_state_dict(state),
    ):
        with raises(ValueError, "'0.weight'", "on the meta device", "aterialise"):
            refused()
        assert ewc.n_tasks == 1
        assert same_state(ewc, fisher, anchor)
    model.to_empty(device="cpu")
    model.load_state_dict(parameters)
    assert ewc().item() == expected


@gpu
def test_row_26_several_devices(kind):
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = make_model()[:2].cuda()
            self.second = make_model()[2]

        def forward(self, x):
            return self.second(self.first(x.cuda()).cpu())

    model, ewc = make(kind, Split())
    _, reference = make(kind)
    assert ewc().device == model.first[0].weight.device
    assert ewc().item() == pytest.approx(reference().item(), rel=1e-4)
    ewc().backward()
    assert model.second.weight.grad.device.type == "cpu"


@gpu
def test_row_27_a_batch_on_another_device(kind):
    _, ewc = make(kind, make_model().cuda())
    _, reference = make(kind)
    assert_close({n: f.cpu() for n, f in ewc.fisher.items()}, reference.fisher)
    _, ewc = make(kind, n_tasks=0)
    ewc.consolidate([(x.cuda(), y.cuda()) for x, y in make_task()])
    assert_close(ewc.fisher, reference.fisher)


def test_row_32_the_state_lands_on_the_parameters_own_device_and_dtype(kind):
    # Where only one device is to be had, a dtype shows that the parameters decide.
    model, ewc = make(kind)
    other_model = copy.deepcopy(model).double()
    other = kind(other_model, Classification())
    other.load_state_dict(ewc.state_dict())
    for name, parameter in other_model.named_parameters():
        assert other.fisher[name].dtype is torch.float64
        assert other.fisher[name].device == parameter.device
        assert other.anchor[name].device == parameter.device
    assert other().item() == pytest.approx(
        written_out([as_task(ewc)], model, ewc.strength).item(), rel=1e-12
    )


@gpu
def test_row_32_loaded_on_another_device(kind):
    model, ewc = make(kind)
    other = kind(copy.deepcopy(model).cuda(), Classification())
    other.load_state_dict(ewc.state_dict())
    assert all(one.is_cuda for one in other.fisher.values())
    assert all(one.is_cuda for one in other.anchor.values())
    assert other().item() == pytest.approx(ewc().item(), rel=1e-5)
    ewc.load_state_dict(other.state_dict())
    assert not any(one.is_cuda for one in ewc.fisher.values())


class Recurrent(nn.Module):
    def __init__(self, layer, note=lambda enabled: None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer(1, 4, batch_first=True)
        self.read = nn.Linear(4, CLASSES)
        self.note = note

    def forward(self, x):
        self.note(torch.backends.cudnn.enabled)
        return self.read(self.layer(x.unsqueeze(2))[0][:, -1])


LAYERS = pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])


@LAYERS
def test_row_39_recurrent_layers_of_single_samples_run_without_cudnn(kind, layer):
    """cuDNN refuses their reverse pass in eval mode; here it shows that it would be off."""
    seen = []
    model = Recurrent(layer, seen.append)
    ewc = kind(model, Classification())
    ewc.consolidate(make_task())
    assert False in seen
    assert torch.backends.cudnn.enabled
    assert_close(ewc.fisher, oracle.fisher(model.eval(), make_task()))


@gpu
@LAYERS
def test_row_39_recurrent_layers_on_an_accelerator(kind, layer):
    model = Recurrent(layer)
    expected = oracle.fisher(model.eval(), make_task())
    _, ewc = make(kind, model.train().cuda(), n_tasks=0)
    ewc.consolidate(make_task())
    for name, one in ewc.fisher.items():
        torch.testing.assert_close(one.cpu().double(), expected[name], rtol=1e-3, atol=1e-6)
