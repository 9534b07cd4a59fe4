import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from ewc.errors import InvalidBatch
from ewc.likelihoods import Classification, Custom, Likelihood, Regression, TimeSeries


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_against_torch() -> None:
    y, t = torch.randn(5, 3, 4), torch.randint(0, 4, (5, 3))
    expected = F.cross_entropy(y.permute(1, 2, 0), t.T, reduction="none").sum(1)
    assert_close(TimeSeries().nll(y, t), expected)
    batch_first = TimeSeries(batch_first=True)
    assert_close(batch_first.nll(y.transpose(0, 1), t.T), expected)
    assert (TimeSeries().batch_dim, batch_first.batch_dim) == (1, 0)


def test_weights_multiply_the_steps() -> None:
    y, t, weights = torch.randn(5, 3, 4), torch.randn(5, 3, 4), torch.rand(5, 3) * 3
    expected = (F.mse_loss(y, t, reduction="none").sum(2) / 2 * weights).sum(0)
    assert_close(TimeSeries(Regression()).nll(y, t, weights), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float64])
def test_numbers_are_weights(dtype: torch.dtype) -> None:
    y, t = torch.randn(5, 3, 4), torch.randint(0, 4, (5, 3))
    mask = torch.rand(5, 3) < 0.5
    assert_close(TimeSeries().nll(y, t, mask.to(dtype)), TimeSeries().nll(y, t, mask))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("step", [Classification(), Regression()])
def test_masked_steps_contribute_exactly_nothing(
    garbage: float, step: Classification | Regression
) -> None:
    mask = torch.tensor([[True, False], [False, False]])
    clean = torch.randn(2, 2, 3)
    y = torch.where(mask[..., None], clean, garbage).requires_grad_()
    t = torch.where(mask[..., None], torch.randn(2, 2, 3).softmax(2), garbage)
    likelihood = TimeSeries(step)
    for losses in (
        likelihood.nll(y, t, mask),
        likelihood.sampled_nll(y, t, mask),
        likelihood.exact_terms(y, t, mask).sum(0),
    ):
        assert losses[1] == 0
        (gradient,) = torch.autograd.grad(losses.sum(), y)
        assert (gradient[mask] != 0).all()
        assert (gradient[~mask] == 0).all()


def test_ignored_and_masked_steps_add_up() -> None:
    y = torch.randn(3, 1, 4)
    t, mask = torch.tensor([[1], [-100], [77]]), torch.tensor([[0.5], [1.0], [0.0]])
    expected = 0.5 * F.cross_entropy(y[0], t[0], reduction="none")
    assert_close(TimeSeries().nll(y, t, mask), expected)


def test_a_mask_needs_no_targets_but_for_the_empirical() -> None:
    y, mask = torch.randn(5, 3, 4), torch.rand(5, 3) < 0.5
    terms = TimeSeries().exact_terms(y, None, mask).reshape(4, 5, 3)
    assert ((terms != 0).all(0) == mask).all()


def test_transform_sees_whole_sequences() -> None:
    def following(tokens: Tensor) -> Tensor:
        assert tokens.shape == (5, 3)
        return F.pad(tokens[1:], (0, 0, 0, 1), value=-100)

    y, tokens = torch.randn(5, 3, 4), torch.randint(0, 4, (5, 3))
    assert_close(
        TimeSeries(Classification(target_transform=following)).nll(y, tokens),
        TimeSeries().nll(y[:-1], tokens[1:]),
    )


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_weights_must_be_finite_and_not_negative(bad: float) -> None:
    y, t, weights = torch.randn(2, 1, 4), torch.zeros(2, 1).long(), torch.tensor([[1.0], [bad]])
    for function in (TimeSeries().nll, TimeSeries().exact_terms):
        with pytest.raises(InvalidBatch, match="weights in a mask must be finite and >= 0"):
            function(y, t, weights)


def test_weights_must_be_real() -> None:
    with pytest.raises(InvalidBatch, match="must be boolean or real weights; found Tensor"):
        TimeSeries().nll(torch.randn(2, 1, 4), torch.zeros(2, 1).long(), torch.ones(2, 1) * 1j)


@pytest.mark.parametrize("shape", [(3, 5), (5, 4)])
def test_mask_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidBatch, match=r"must be \[S, N\] for outputs \[5, 3, 4\]; found"):
        TimeSeries().nll(torch.randn(5, 3, 4), torch.zeros(5, 3).long(), torch.ones(shape))


def test_targets_of_another_shape() -> None:
    with pytest.raises(InvalidBatch, match=r"\[S, N\].*found Tensor\[3, 5\].*batch_first=True"):
        TimeSeries().nll(torch.randn(5, 3, 4), torch.zeros(3, 5).long())
    with pytest.raises(InvalidBatch, match="class indices"):
        TimeSeries().nll(torch.randn(5, 3, 4), torch.zeros(5, 3, 1, 1))


def test_labels_outside_the_head() -> None:
    with pytest.raises(InvalidBatch, match=r"allowed_outputs \(0, 3\), 0 to 1.*found 3"):
        TimeSeries(Classification([0, 3])).nll(torch.randn(1, 2, 4), torch.tensor([[1, 3]]))


def test_outputs_of_another_shape() -> None:
    with pytest.raises(InvalidBatch, match=r"must be \[N, S, F\]; found Tensor\[5, 3\]"):
        TimeSeries(batch_first=True).nll(torch.randn(5, 3), torch.zeros(5).long())


class Smoothed(Classification):
    def nll(self, outputs: Tensor, *rest: Tensor) -> Tensor:
        return super().nll(outputs, *rest) * 0.9


@pytest.mark.parametrize("step", [Custom(len), TimeSeries(), Smoothed(), "classification"])
def test_wrong_step(step: Likelihood) -> None:
    with pytest.raises(TypeError, match=r"a Regression or another Pointwise .*; found"):
        TimeSeries(step)


def test_wrong_batch_first() -> None:
    with pytest.raises(TypeError, match="batch_first must be True or False; found 1"):
        TimeSeries(batch_first=1)


def test_repr() -> None:
    assert repr(TimeSeries(Regression(2), batch_first=True)) == (
        "TimeSeries(Regression(variance=2.0, allowed_outputs=None, target_transform=None), "
        "batch_first=True)"
    )
