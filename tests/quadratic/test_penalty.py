import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from ewc.quadratic import kernels
from ewc.quadratic.penalty import Penalty, expression, result_dtype

BLOCK = kernels.CPU.block

SHAPES = {
    "small": [(3, 4), (5,), ()],
    "many": [(300, 70)] + [(40,)] * 50,
    "beyond one group": [(8000,)] * 10,
    "one block": [(200, 300)],
    "blocks": [(3, BLOCK), (2, 5), (BLOCK + 1,), (2 * BLOCK,)],
    "empty": [(0, 4), (3,)],
    "only empty": [(0,)],
}

LIMITS = {
    "CPU": kernels.CPU,
    "accelerator": kernels.ACCELERATOR,
    "lists": kernels.Limits(small=0, listed=2**20, block=2**20),
}


@pytest.fixture(params=LIMITS.values(), ids=LIMITS.keys(), autouse=True)
def limits(request, monkeypatch):
    """Every strategy on every device."""
    monkeypatch.setattr(kernels, "CPU", request.param)
    monkeypatch.setattr(kernels, "ACCELERATOR", request.param)


def problem(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(shape, dtype):
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)

    thetas = [nn.Parameter(draw(shape, dtype)) for shape in shapes]
    precisions = [draw(shape, wide).abs() for shape in shapes]
    anchors = [draw(shape, wide) for shape in shapes]
    return thetas, precisions, anchors


def exact(thetas, precisions, anchors, constant, strength):
    thetas = [theta.detach().to(torch.complex128).requires_grad_() for theta in thetas]
    value = 0.5 * strength * constant + torch.zeros((), dtype=torch.float64)
    for theta, precision, anchor in zip(thetas, precisions, anchors, strict=True):
        distance = theta - anchor
        value = value + 0.5 * strength * (precision.double() * distance.abs() ** 2).sum()
    return value, torch.autograd.grad(value, thetas)


def assert_gradients(found, expected):
    for one, other in zip(found, expected, strict=True):
        other = other if one.is_complex() else other.real
        torch.testing.assert_close(one.to(other.dtype), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("form", ["one pass", "expression"])
def test_value_and_gradient(shapes, dtype, form):
    thetas, precisions, anchors = problem(shapes, dtype)
    if form == "one pass":
        value = Penalty(thetas, precisions, anchors, 0.3)(thetas, 2.5)
    else:
        value = expression(thetas, precisions, anchors, 0.3, 2.5, result_dtype(thetas))
    expected, gradients = exact(thetas, precisions, anchors, 0.3, 2.5)
    assert value.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(torch.autograd.grad(value, thetas), gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["one pass", "expression"])
def test_half_precision_is_computed_in_float32(dtype, form):
    thetas, precisions, anchors = problem(SHAPES["blocks"], dtype)
    make = Penalty(thetas, precisions, anchors, 0.0)
    if form == "one pass":
        value = make(thetas, 2.0)
    else:
        value = expression(thetas, precisions, anchors, 0.0, 2.0, result_dtype(thetas))
    expected, gradients = exact(thetas, precisions, anchors, 0.0, 2.0)
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    for theta, gradient in zip(thetas, gradients, strict=True):
        assert theta.grad.dtype is dtype
        torch.testing.assert_close(theta.grad, gradient.real.float().to(dtype))


@pytest.mark.parametrize("form", ["one pass", "expression"])
def test_autocast_is_off_inside(form):
    thetas, precisions, anchors = problem(SHAPES["small"])
    expected, _ = exact(thetas, precisions, anchors, 0.0, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if form == "one pass":
            value = Penalty(thetas, precisions, anchors, 0.0)(thetas, 1.0)
        else:
            value = expression(thetas, precisions, anchors, 0.0, 1.0, result_dtype(thetas))
        assert torch.is_autocast_enabled("cpu")
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_mixed_dtypes():
    thetas, precisions, anchors = [], [], []
    for dtype in (torch.bfloat16, torch.float32, torch.complex64, torch.float16, torch.float64):
        for group, new in zip(
            (thetas, precisions, anchors), problem([(4, 3), (3000,)], dtype), strict=True
        ):
            group.extend(new)
    value = Penalty(thetas, precisions, anchors, 0.0)(thetas, 1.0)
    expected, gradients = exact(thetas, precisions, anchors, 0.0, 1.0)
    assert value.dtype is torch.float64
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for theta, found, gradient in zip(
        thetas, torch.autograd.grad(value, thetas), gradients, strict=True
    ):
        assert found.dtype is theta.dtype
        gradient = gradient if theta.is_complex() else gradient.real
        torch.testing.assert_close(found, gradient.to(theta.dtype))


def test_wide_state_beside_narrow_parameters():
    thetas, precisions, anchors = problem(SHAPES["blocks"], torch.float64)
    thetas = [nn.Parameter(theta.detach().float()) for theta in thetas]
    value = Penalty(thetas, precisions, anchors, 0.0)(thetas, 1.0)
    expected, gradients = exact(thetas, precisions, anchors, 0.0, 1.0)
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(torch.autograd.grad(value, thetas), gradients)


def test_memory_layout_does_not_matter():
    theta = nn.Parameter(torch.randn(64, 32, 9, 9).to(memory_format=torch.channels_last))
    precision, anchor = torch.rand(64, 32, 9, 9), torch.randn(64, 32, 9, 9)
    value = Penalty([theta], [precision], [anchor], 0.0)([theta], 1.0)
    expected, gradients = exact([theta], [precision], [anchor], 0.0, 1.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(torch.autograd.grad(value, [theta]), gradients)


@pytest.mark.parametrize("shapes", [SHAPES["small"], SHAPES["blocks"]], ids=["small", "blocks"])
def test_frozen_thetas_count_and_get_no_gradient(shapes):
    thetas, precisions, anchors = problem(shapes)
    thetas[0].requires_grad_(False)
    value = Penalty(thetas, precisions, anchors, 0.0)(thetas, 1.0)
    expected, gradients = exact(thetas, precisions, anchors, 0.0, 1.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    assert thetas[0].grad is None
    assert_gradients([theta.grad for theta in thetas[1:]], gradients[1:])


def test_without_any_gradient():
    thetas, precisions, anchors = problem(SHAPES["blocks"])
    penalty = Penalty(thetas, precisions, anchors, 0.1)
    with torch.no_grad():
        without = penalty(thetas, 1.0)
    assert not without.requires_grad
    assert torch.equal(without, penalty(thetas, 1.0).detach())
    for theta in thetas:
        theta.requires_grad_(False)
    assert not penalty(thetas, 1.0).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
def test_at_the_anchor_it_is_exactly_zero(dtype):
    thetas, precisions, _ = problem(SHAPES["blocks"], dtype)
    wide = torch.promote_types(dtype, torch.float32)
    value = Penalty(thetas, precisions, [t.detach().to(wide) for t in thetas], 0.0)(thetas, 2.5)
    assert value.item() == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(value, thetas))


def test_strength_zero_is_zero_even_where_squares_overflow():
    theta = nn.Parameter(torch.full((3,), 1e25))
    penalty = Penalty([theta], [torch.ones(3)], [torch.zeros(3)], 0.0)
    assert penalty([theta], 1.0).isinf()
    value = penalty([theta], 0.0)
    assert value.item() == 0.0
    value.backward()
    assert torch.equal(theta.grad, torch.zeros(3))


def test_strength_beyond_the_dtype():
    theta = nn.Parameter(torch.ones(3))
    value = Penalty([theta], [torch.ones(3)], [torch.zeros(3)], 0.0)([theta], 1e300)
    assert value.isinf()
    (gradient,) = torch.autograd.grad(value, [theta])
    assert gradient.isinf().all()


@pytest.mark.parametrize("shapes", [SHAPES["small"], SHAPES["blocks"]], ids=["small", "blocks"])
class TestRow44:
    """Backward in every way that autograd offers."""

    def test_incoming_gradient(self, shapes):
        thetas, precisions, anchors = problem(shapes)
        value = Penalty(thetas, precisions, anchors, 0.0)(thetas, 2.0)
        value.backward(gradient=torch.tensor(-3.0))
        _, gradients = exact(thetas, precisions, anchors, 0.0, -6.0)
        assert_gradients([theta.grad for theta in thetas], gradients)

    def test_accumulation_over_calls(self, shapes):
        thetas, precisions, anchors = problem(shapes)
        penalty = Penalty(thetas, precisions, anchors, 0.0)
        for _ in range(3):
            (penalty(thetas, 1.0) / 3).backward()
        _, gradients = exact(thetas, precisions, anchors, 0.0, 1.0)
        assert_gradients([theta.grad for theta in thetas], gradients)

    def test_retained_graph(self, shapes):
        thetas, precisions, anchors = problem(shapes)
        value = Penalty(thetas, precisions, anchors, 0.0)(thetas, 1.0)
        for _ in range(3):
            value.backward(retain_graph=True)
        value.backward()
        _, gradients = exact(thetas, precisions, anchors, 0.0, 4.0)
        assert_gradients([theta.grad for theta in thetas], gradients)
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()

    def test_gradient_is_that_of_the_forward(self, shapes):
        thetas, precisions, anchors = problem(shapes)
        _, gradients = exact(thetas, precisions, anchors, 0.0, 1.0)
        value = Penalty(thetas, precisions, anchors, 0.0)(thetas, 1.0)
        with torch.no_grad():
            for theta in thetas:
                theta.add_(1.0)
        value.backward(retain_graph=True)
        assert_gradients([theta.grad for theta in thetas], gradients)
        # Formed anew it would be the gradient of other parameters.
        with pytest.raises(RuntimeError, match="inplace"):
            value.backward()

    def test_returned_gradients_are_the_callers(self, shapes):
        thetas, precisions, anchors = problem(shapes)
        value = Penalty(thetas, precisions, anchors, 0.0)(thetas, 1.0)
        first = torch.autograd.grad(value, thetas, retain_graph=True)
        for gradient in first:
            gradient.zero_()
        _, gradients = exact(thetas, precisions, anchors, 0.0, 1.0)
        assert_gradients(torch.autograd.grad(value, thetas, retain_graph=True), gradients)
        assert_gradients(torch.autograd.grad(value, thetas), gradients)

    def test_create_graph(self, shapes):
        thetas, precisions, anchors = problem(shapes)
        value = Penalty(thetas, precisions, anchors, 0.0)(thetas, 2.0)
        first = torch.autograd.grad(value, thetas, create_graph=True)
        _, gradients = exact(thetas, precisions, anchors, 0.0, 2.0)
        assert_gradients(first, gradients)
        second = torch.autograd.grad(sum(gradient.sum() for gradient in first), thetas)
        assert_gradients(second, [2.0 * precision + 0j for precision in precisions])

    def test_some_of_the_inputs(self, shapes):
        thetas, precisions, anchors = problem(shapes)
        value = Penalty(thetas, precisions, anchors, 0.0)(thetas, 1.0)
        _, gradients = exact(thetas, precisions, anchors, 0.0, 1.0)
        for index in (1, 0):
            found = torch.autograd.grad(value, thetas[index], retain_graph=True)
            assert_gradients(found, [gradients[index]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradcheck(dtype):
    thetas, precisions, anchors = problem([(3, 2), (2,)], dtype)
    penalty = Penalty(thetas, precisions, anchors, 0.5)
    assert gradcheck(lambda *thetas: penalty(thetas, 1.5), thetas)
    assert gradgradcheck(lambda *thetas: penalty(thetas, 1.5), thetas)


class Launches(TorchDispatchMode):
    """Counts the operations that are not views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [each.alias_info for each in func._schema.returns]
        self.count += not any(alias is not None and not alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limits", [LIMITS["lists"]], ids=["lists"], indirect=True)
def test_lists_take_no_launch_for_each_parameter():
    counts = []
    for number in (10, 100):
        thetas, precisions, anchors = problem([(3, 40)] * number)
        penalty = Penalty(thetas, precisions, anchors, 0.3)
        with Launches() as launches:
            torch.autograd.grad(penalty(thetas, 2.5), thetas)
        counts.append(launches.count)
    assert counts[0] == counts[1] < 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
# Said once by PyTorch, when synchronisations are first refused.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
class TestGPU:
    def test_value_and_gradient(self):
        thetas, precisions, anchors = problem(SHAPES["blocks"] + SHAPES["many"])
        expected, gradients = exact(thetas, precisions, anchors, 0.3, 2.5)
        thetas = [nn.Parameter(theta.detach().cuda()) for theta in thetas]
        penalty = Penalty(thetas, [p.cuda() for p in precisions], [a.cuda() for a in anchors], 0.3)
        value = penalty(thetas, 2.5)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        found = torch.autograd.grad(value, thetas)
        assert_gradients([gradient.cpu() for gradient in found], gradients)

    def test_nothing_is_synchronised(self):
        thetas, precisions, anchors = problem(SHAPES["blocks"] + SHAPES["many"])
        thetas = [nn.Parameter(theta.detach().cuda()) for theta in thetas]
        penalty = Penalty(thetas, [p.cuda() for p in precisions], [a.cuda() for a in anchors], 0.3)
        penalty(thetas, 1.0).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            (penalty(thetas, 2.0) * 3.0).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_several_devices(self):
        thetas, precisions, anchors = problem(SHAPES["small"] + SHAPES["blocks"])
        expected, gradients = exact(thetas, precisions, anchors, 0.0, 2.0)
        devices = [("cuda", "cpu")[index % 2] for index in range(len(thetas))]
        thetas, precisions, anchors = (
            [tensor.detach().to(device) for tensor, device in zip(group, devices, strict=True)]
            for group in (thetas, precisions, anchors)
        )
        thetas = [nn.Parameter(theta) for theta in thetas]
        value = Penalty(thetas, precisions, anchors, 0.0)(thetas, 2.0)
        assert value.device == thetas[0].device
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        found = torch.autograd.grad(value, thetas)
        assert [gradient.device for gradient in found] == [theta.device for theta in thetas]
        assert_gradients([gradient.cpu() for gradient in found], gradients)
