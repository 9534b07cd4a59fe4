import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ewc.quadratic.quadratic import Quadratic, fits, protected_rows, raised, snapshot


def tasks_of(n_tasks, size, seed, *, sparsity=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_tasks):
        fisher = torch.rand(size, generator=generator, dtype=torch.float64) ** 4
        fisher *= torch.rand(size, generator=generator) >= sparsity
        anchor = 3 * torch.randn(size, generator=generator, dtype=dtype)
        yield fisher.float(), anchor


def plus(quadratic, fisher, anchor):
    new, rise = quadratic.plus(fisher, anchor)
    return raised({"p": new}, {"p": rise})["p"]


def merged(tasks):
    quadratic = None
    for fisher, anchor in tasks:
        new = Quadratic(fisher, anchor)
        quadratic = new if quadratic is None else plus(quadratic, fisher, anchor)
    return quadratic


def value(quadratic, theta):
    distance = theta.to(quadratic.anchor.dtype) - quadratic.anchor
    return (quadratic.fisher * distance.abs() ** 2).sum().item() + quadratic.constant


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_hundred_tasks_equal_the_sum_written_out(sparsity, dtype):
    tasks = list(tasks_of(100, (50, 4), 0, sparsity=sparsity, dtype=dtype))
    quadratic = merged(tasks)
    theta = torch.randn(50, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))

    wide = theta.to(torch.promote_types(dtype, torch.float64))
    terms = [(fisher.double(), anchor.to(wide.dtype)) for fisher, anchor in tasks]
    expected = sum((f * (wide - a).abs() ** 2).sum().item() for f, a in terms)
    assert value(quadratic, theta) == pytest.approx(expected, rel=1e-6)

    gradient = quadratic.fisher * (theta - quadratic.anchor)
    exact = sum(f * (wide - a) for f, a in terms)
    assert (gradient - exact).norm() <= 1e-5 * exact.norm()


@settings(deadline=None, max_examples=30)
@given(n_tasks=st.integers(1, 6), seed=st.integers(0, 2**31), sparsity=st.floats(0, 1))
def test_any_tasks_equal_the_sum_written_out(n_tasks, seed, sparsity):
    tasks = list(tasks_of(n_tasks, (6,), seed, sparsity=sparsity))
    theta = torch.randn(6, generator=torch.Generator().manual_seed(seed))
    expected = sum((f.double() * (theta.double() - a.double()) ** 2).sum().item() for f, a in tasks)
    assert value(merged(tasks), theta) == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_same_anchor_adds_nothing_to_the_constant():
    anchor = torch.randn(20)
    quadratic = plus(Quadratic(torch.rand(20), anchor), torch.rand(20), anchor)
    assert torch.equal(quadratic.anchor, anchor)
    assert quadratic.constant == 0.0


def test_the_latest_anchor_where_the_curvature_is_zero():
    old = Quadratic(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0]))
    new = plus(old, torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0.1, 0.1, 0.1]))
    assert torch.equal(new.fisher, torch.tensor([0.0, 2.0, 1.0]))
    assert torch.equal(new.anchor, torch.tensor([0.1, 0.1, 1.0]))
    assert new.constant == 0.0


def test_large_and_tiny_curvatures_stay_finite():
    old = Quadratic(torch.tensor([1e30, 1e-45, 1e30]), torch.zeros(3))
    new = plus(old, torch.tensor([1e30, 1e-45, 0.0]), torch.ones(3))
    assert new.anchor.isfinite().all()
    assert new.constant < float("inf")


def test_grown_rows_are_flat_until_the_next_task():
    old = Quadratic(torch.ones(2, 3), torch.zeros(2, 3), 0.5)
    grown = old.grown(torch.full((4, 3), 7.0))
    assert torch.equal(grown.fisher, torch.cat([torch.ones(2, 3), torch.zeros(2, 3)]))
    assert torch.equal(grown.anchor, torch.cat([torch.zeros(2, 3), torch.full((2, 3), 7.0)]))
    assert grown.constant == 0.5


def test_is_never_narrowed():
    quadratic = Quadratic(torch.rand(3), torch.rand(3))
    wide = quadratic.like(nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    assert wide.fisher.dtype is wide.anchor.dtype is torch.float64
    again = wide.like(nn.Parameter(torch.zeros(3)))
    assert again is wide


def test_complex_parameter_has_a_real_fisher():
    quadratic = Quadratic(torch.rand(3), torch.rand(3))
    like = quadratic.like(nn.Parameter(torch.zeros(3, dtype=torch.complex128)))
    assert like.fisher.dtype is torch.float64
    assert like.anchor.dtype is torch.complex128


@pytest.mark.parametrize(
    ("shape", "present", "expected"),
    [
        ((3, 2), (3, 2), True),
        ((3, 2), (5, 2), True),
        ((0, 2), (5, 2), True),
        ((3, 2), (2, 2), False),
        ((3, 2), (3, 3), False),
        ((3, 1), (4, 2), False),
        ((3,), (3, 2), False),
        ((), (), True),
        ((), (1,), False),
    ],
)
def test_fits(shape, present, expected):
    assert fits(torch.Size(shape), torch.Size(present)) is expected


def test_protected_rows():
    parameter = torch.arange(6.0).reshape(3, 2)
    assert protected_rows(parameter, torch.zeros(3, 2)) is parameter
    assert torch.equal(protected_rows(parameter, torch.zeros(2, 2)), parameter[:2])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
    ],
)
def test_snapshot_is_a_wide_copy(dtype, expected):
    parameter = nn.Parameter(torch.ones(2, 3, dtype=dtype))
    taken = snapshot(parameter)
    assert taken.dtype is expected
    assert not taken.requires_grad
    assert taken.data_ptr() != parameter.data_ptr()
