"""What every built-in likelihood must do, whatever it says about the data."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ewc.errors import InvalidBatch
from ewc.likelihoods import Bernoulli, Classification, Regression, TimeSeries
from tests.likelihoods.cases import CASES, Case, normal

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def in_vmap(case: Case, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` on batches of one inside vmap, results as of the whole batch."""

    def of_one(*samples: Tensor) -> Tensor:
        batch = (
            sample.unsqueeze(case.dim(tensor))
            for sample, tensor in zip(samples, tensors, strict=True)
        )
        return function(*batch).squeeze(-1)

    dims = tuple(case.dim(tensor) for tensor in tensors)
    return torch.func.vmap(of_one, in_dims=dims, out_dims=-1, randomness="different")(*tensors)


def squares(terms: Tensor, theta: Tensor) -> Tensor:
    """The sum over terms of squared gradients."""
    rows = [torch.autograd.grad(term, theta, retain_graph=True)[0] for term in terms.flatten()]
    return torch.stack([torch.zeros_like(theta), *(row.square() for row in rows)]).sum(0)


def model_of_one(case: Case) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Parameters, outputs that depend on all of them, and the rest, for one sample."""
    *_, (outputs, *rest) = case.split(*case.make(3))
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    return theta, outputs + (normal(*outputs.shape, 5) @ theta), tuple(rest)


@every_case
@pytest.mark.parametrize("n", [0, 1, 6])
def test_one_value_per_sample(case: Case, n: int) -> None:
    outputs, *rest = case.make(n)
    assert case.likelihood.nll(outputs, *rest).shape == (n,)
    assert case.likelihood.sampled_nll(outputs, *rest).shape == (n,)
    assert case.likelihood.exact_terms(outputs, *rest).shape[1:] == (n,)


@every_case
@settings(max_examples=5, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 99))
def test_nll_is_the_reference_alone_and_in_any_batch(case: Case, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    batch = case.make(n)
    expected = torch.stack([case.reference(*one) for one in case.split(*batch)])
    nll = case.likelihood.nll
    assert_close(nll(*batch), expected)
    assert_close(torch.cat([nll(*one) for one in case.split(*batch)]), expected)
    assert_close(in_vmap(case, nll, *batch), expected)


@every_case
def test_terms_are_the_same_alone_and_in_any_batch(case: Case) -> None:
    batch = case.make(6)
    terms = case.likelihood.exact_terms
    expected = torch.cat([terms(*one) for one in case.split(*batch)], 1)
    assert_close(terms(*batch), expected)
    assert_close(in_vmap(case, terms, *batch), expected)


@every_case
@pytest.mark.parametrize("path", ["batch", "vmap"])
def test_gradients_are_those_of_the_reference(case: Case, path: str) -> None:
    outputs, *rest = case.make(6)
    outputs.requires_grad_()
    nll = case.likelihood.nll
    found = nll(outputs, *rest) if path == "batch" else in_vmap(case, nll, outputs, *rest)
    expected = torch.stack([case.reference(*one) for one in case.split(outputs, *rest)])
    weights = normal(6)
    assert_close(
        torch.autograd.grad((found * weights).sum(), outputs),
        torch.autograd.grad((expected * weights).sum(), outputs),
    )


@every_case
def test_exact_terms_are_the_expectation_over_all_outcomes(case: Case) -> None:
    theta, outputs, rest = model_of_one(case)
    likelihood = case.drawn or case.likelihood
    extras = rest[1:]
    expected, total = torch.zeros_like(theta), 0.0
    for probability, targets in case.outcomes(outputs.detach()):
        if case.likelihood is CASES["ignore_index is a class"].likelihood:
            targets = torch.where(rest[0] == 0, -100, targets)
        elif case.likelihood is CASES["pixels, ignored"].likelihood:
            targets = torch.where(rest[0] == -100, -100, targets)
        total += probability
        expected += probability * squares(likelihood.nll(outputs, targets, *extras), theta)
    assert math.isclose(total, 1)
    terms = case.likelihood.exact_terms(outputs, *rest)
    assert_close(squares(terms, theta), expected)


@every_case
def test_draws_have_the_exact_terms_as_their_expectation(case: Case) -> None:
    theta, outputs, rest = model_of_one(case)
    copies = 20_000
    flat = outputs.detach().flatten()
    jacobian = torch.stack(
        [torch.autograd.grad(y, theta, retain_graph=True)[0] for y in outputs.flatten()]
    )
    many = [t.repeat_interleave(copies, case.dim(t)) for t in (outputs.detach(), *rest)]
    many[0].requires_grad_()
    nll = case.likelihood.sampled_nll(*many)
    (gradient,) = torch.autograd.grad(nll.sum(), many[0])
    per_sample = gradient.movedim(case.dim(gradient), 0).reshape(copies, len(flat)) @ jacobian
    expected = squares(case.likelihood.exact_terms(outputs, *rest), theta)
    assert_close(per_sample.square().mean(0), expected, rtol=0.1, atol=1e-6)


@every_case
def test_draws_depend_on_the_seed_alone(case: Case) -> None:
    batch = case.make(50)

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return case.likelihood.sampled_nll(*batch), in_vmap(
            case, case.likelihood.sampled_nll, *batch
        )

    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])


@every_case
def test_samples_of_a_vmapped_batch_draw_for_themselves(case: Case) -> None:
    *_, (outputs, *_rest) = case.split(*case.make(3))
    many = outputs.repeat_interleave(50, case.dim(outputs))
    assert in_vmap(case, case.likelihood.sampled_nll, many).unique().numel() > 1


@every_case
def test_drawn_targets_are_data_that_the_nll_takes(case: Case) -> None:
    outputs, *rest = case.make(4)
    outputs.requires_grad_()
    targets = case.likelihood.sample(outputs)
    assert not targets.requires_grad
    likelihood = case.drawn or case.likelihood
    assert likelihood.nll(outputs, targets, *rest[1:]).isfinite().all()


@every_case
def test_targets_may_be_absent_but_for_the_empirical(case: Case) -> None:
    outputs, *_ = case.make(4)
    for rest in ((), (None,)):
        assert case.likelihood.sampled_nll(outputs, *rest).shape == (4,)
        assert case.likelihood.exact_terms(outputs, *rest).shape[1:] == (4,)
        with pytest.raises(InvalidBatch, match=r"must hold targets .* found none"):
            case.likelihood.nll(outputs, *rest)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_outputs_give_a_nll_in_full(case: Case, dtype: torch.dtype) -> None:
    outputs, *rest = case.make(4)
    outputs = outputs.to(dtype)
    found = case.likelihood.nll(outputs, *rest)
    assert found.dtype == torch.float32
    assert_close(found, case.likelihood.nll(outputs.double(), *rest).float())
    assert case.likelihood.exact_terms(outputs, *rest).dtype == torch.float32


@every_case
def test_one_synchronisation_per_call(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = case.make(4)
    read: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero"):
        original = getattr(Tensor, name)

        def spy(*args: Tensor, _name: str = name, _original: Callable[..., object] = original):
            read.append(_name)
            return _original(*args)

        monkeypatch.setattr(Tensor, name, spy)
    for function in (case.likelihood.nll, case.likelihood.sampled_nll, case.likelihood.exact_terms):
        read.clear()
        function(*batch)
        assert read == ["tolist"]


@every_case
def test_all_three_types_are_supported(case: Case) -> None:
    assert all(case.likelihood.supports(kind) for kind in ("empirical", "mc", "exact"))


@pytest.mark.parametrize(
    "likelihood",
    [
        Classification([1, 2], target_transform=torch.abs, ignore_index=7),
        Bernoulli([0, 1]),
        Regression(torch.tensor([1.0, 2.0]), allowed_outputs=[0, 1]),
        TimeSeries(Regression(3.0), batch_first=True),
    ],
    ids=lambda likelihood: type(likelihood).__name__,
)
def test_copies_and_pickles_are_equal(
    likelihood: Classification | Bernoulli | Regression | TimeSeries,
) -> None:
    for other in (copy.deepcopy(likelihood), pickle.loads(pickle.dumps(likelihood))):
        assert repr(other) == repr(likelihood)
        assert other.batch_dim == likelihood.batch_dim
    assert repr(likelihood).startswith(f"{type(likelihood).__name__}(")


@every_case
@pytest.mark.parametrize("outputs", [(torch.zeros(2, 3), None), {"y": 1}, torch.zeros(2, 3).int()])
def test_outputs_that_are_no_real_tensor_are_refused(case: Case, outputs: object) -> None:
    with pytest.raises(InvalidBatch, match="one tensor of real numbers; found"):
        case.likelihood.nll(outputs, torch.zeros(2))


@pytest.mark.parametrize("name", [name for name in CASES if "transform" not in name])
def test_targets_that_are_no_tensor_are_refused(name: str) -> None:
    case = CASES[name]
    outputs, *_ = case.make(2)
    with pytest.raises(InvalidBatch, match=r"one tensor; found list of 2 int from the batch"):
        case.likelihood.nll(outputs, [0, 1])
