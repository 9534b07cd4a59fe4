import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from ewc.errors import InvalidBatch
from ewc.likelihoods import Classification

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
REALS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class TestAgainstTorch:
    @pytest.mark.parametrize("dtype", INTEGERS)
    def test_class_indices(self, dtype: torch.dtype) -> None:
        logits, targets = torch.randn(6, 4, 3, 2), torch.randint(0, 4, (6, 3, 2))
        expected = F.cross_entropy(logits, targets, reduction="none").sum((1, 2))
        assert_close(Classification().nll(logits, targets.to(dtype)), expected)

    @pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, *REALS])
    def test_one_hot(self, dtype: torch.dtype) -> None:
        logits, targets = torch.randn(6, 4), torch.randint(0, 4, (6,))
        expected = F.cross_entropy(logits, targets, reduction="none")
        assert_close(Classification().nll(logits, F.one_hot(targets, 4).to(dtype)), expected)

    @pytest.mark.parametrize("dtype", REALS)
    def test_probabilities(self, dtype: torch.dtype) -> None:
        logits, p = torch.randn(6, 4, 3), torch.randn(6, 4, 3).softmax(1).to(dtype)
        expected = F.cross_entropy(logits, p.float(), reduction="none").sum(1)
        assert_close(Classification().nll(logits, p), expected)

    @pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2, 255])
    def test_ignore_index(self, ignore_index: int) -> None:
        logits, targets = torch.randn(6, 4, 3), torch.randint(0, 4, (6, 3))
        targets[0], targets[1, :2] = ignore_index, ignore_index
        expected = F.cross_entropy(logits, targets, reduction="none", ignore_index=ignore_index)
        likelihood = Classification(ignore_index=ignore_index)
        assert_close(likelihood.nll(logits, targets), expected.sum(1))

    def test_the_head_is_a_model_of_its_own(self) -> None:
        logits, targets = torch.randn(6, 5), torch.randint(0, 2, (6,))
        for allowed in ([3, 1], range(3, 0, -2), torch.tensor([3, 1]), (i for i in (3, 1))):
            found = Classification(allowed).nll(logits, targets)
            assert_close(found, F.cross_entropy(logits[:, [3, 1]], targets, reduction="none"))


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 5, 2, 4), (1, 5, 1)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_classes_that_lie_last_in_memory(shape: tuple[int, ...], probabilities: bool) -> None:
    torch.manual_seed(0)
    plain = torch.randn(shape, dtype=torch.float64).requires_grad_()
    last = plain.detach().movedim(1, -1).contiguous().requires_grad_()
    assert last.movedim(-1, 1).stride(1) == 1
    targets = torch.randint(5, shape[:1] + shape[2:])
    if probabilities:
        targets = torch.rand(shape, dtype=torch.float64)
        targets = targets / targets.sum(1, keepdim=True)
    likelihood = Classification()
    for function in (likelihood.nll, likelihood.exact_terms):
        expected, found = function(plain, targets), function(last.movedim(-1, 1), targets)
        torch.testing.assert_close(found, expected)
        weights = torch.randn_like(expected)
        (right,) = torch.autograd.grad(expected, plain, weights)
        (gradient,) = torch.autograd.grad(found, last, weights)
        torch.testing.assert_close(gradient.movedim(-1, 1), right)


def test_class_indices_go_through_cross_entropy() -> None:
    """Fisher collection replaces this one call by a faster one."""
    seen = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is F.cross_entropy:
                seen.append(kwargs["reduction"])
            return func(*args, **(kwargs or {}))

    with Recorder():
        Classification().nll(torch.randn(2, 3), torch.tensor([0, 2]))
        Classification([0, 2]).sampled_nll(torch.randn(2, 3))
        Classification().nll(torch.randn(2, 3), torch.eye(3, dtype=torch.bool)[:2])
    assert seen == ["none"] * 3


class TestPositionsThatDoNotCount:
    @pytest.mark.parametrize("garbage", [1e38, math.inf, -math.inf, math.nan])
    def test_contribute_exactly_nothing(self, garbage: float) -> None:
        targets = torch.tensor([[-100, -100], [-100, 1], [0, 1]])
        clean = torch.randn(3, 4, 2)
        logits = torch.where(targets[:, None] == -100, garbage, clean).requires_grad_()
        likelihood = Classification()
        for losses in (
            likelihood.nll(logits, targets),
            likelihood.sampled_nll(logits, targets),
            likelihood.exact_terms(logits, targets).sum(0),
        ):
            assert losses[0] == 0
            (gradient,) = torch.autograd.grad(losses.sum(), logits)
            assert gradient.isfinite().all()
            assert (gradient.movedim(1, -1)[targets == -100] == 0).all()
            assert (gradient.movedim(1, -1)[targets != -100] != 0).all()

    def test_drawn_labels_are_never_ignored(self) -> None:
        logits = torch.tensor([[0.0, 50.0]]).repeat(9, 1)
        likelihood = Classification(ignore_index=1)
        drawn = likelihood.sampled_nll(logits * -1, torch.zeros(9, dtype=torch.long))
        assert_close(drawn, torch.zeros(9))  # label 0, as the logits want
        assert (likelihood.exact_terms(logits / 50, torch.zeros(9).long()) != 0).all()


class TestRuledOutClasses:
    """A logit of -inf is a probability of 0, not an error."""

    def test_cost_nothing(self) -> None:
        logits = torch.tensor([[0.3, -math.inf, 1.0]], requires_grad=True)
        kept = logits[:, [0, 2]]
        likelihood = Classification()
        for found, expected in (
            (
                likelihood.nll(logits, torch.tensor([[0.25, 0, 0.75]])),
                likelihood.nll(kept, torch.tensor([[0.25, 0.75]])),
            ),
            (likelihood.nll(logits, torch.tensor([2])), likelihood.nll(kept, torch.tensor([1]))),
            (likelihood.exact_terms(logits)[[0, 2]], likelihood.exact_terms(kept)),
        ):
            assert_close(found, expected)
            for a, b in zip(found.flatten(), expected.flatten(), strict=True):
                assert_close(
                    torch.autograd.grad(a, logits, retain_graph=True),
                    torch.autograd.grad(b, logits, retain_graph=True),
                )
        assert likelihood.exact_terms(logits)[1] == 0

    def test_are_never_drawn(self) -> None:
        logits = torch.tensor([[0.0, -math.inf, 0.0]]).repeat(1000, 1)
        assert set(Classification().sample(logits).tolist()) == {0, 2}

    def test_nan_logits_stay_visible(self) -> None:
        logits = torch.full((1, 3), math.nan)
        likelihood = Classification()
        assert likelihood.nll(logits, torch.tensor([[0.0, 0.0, 1.0]])).isnan().all()
        assert likelihood.sampled_nll(logits).isnan().all()
        assert likelihood.exact_terms(logits).isnan().all()


def test_unlikely_classes_keep_their_exact_term() -> None:
    logits = torch.tensor([[0.0, -120.0]])  # p = exp(-120), which float32 does not have
    assert_close(
        Classification().exact_terms(logits)[1],
        torch.tensor([math.exp(-60) * 120]),
        rtol=1e-5,
        atol=0,
    )


def test_frequencies_of_draws() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = Classification().sample(p.log().repeat(100_000, 1))
    assert_close(drawn.bincount() / 100_000, p, rtol=0, atol=6e-3)


def test_the_transform_sees_the_raw_targets_first_and_never_drawn_ones() -> None:
    seen = []

    def shift(targets: Tensor) -> Tensor:
        seen.append(targets)
        return F.pad(targets[:, 1:], (0, 1), value=-100)

    logits, tokens = torch.randn(3, 7, 5), torch.randint(0, 7, (3, 5))
    likelihood = Classification(target_transform=shift)
    expected = F.cross_entropy(logits[..., :-1], tokens[:, 1:], reduction="none").sum(1)
    assert_close(likelihood.nll(logits, tokens), expected)
    assert (likelihood.exact_terms(logits, tokens).reshape(7, 5, 3)[:, -1] == 0).all()
    likelihood.sampled_nll(logits, tokens)
    assert len(seen) == 3
    assert all(torch.equal(targets, tokens) for targets in seen)


class TestWrongTargets:
    @pytest.mark.parametrize(
        ("label", "found"), [([3, 0], "found 3"), ([-1, 5], "found -1, 5"), ([2, 300], "300")]
    )
    def test_label_outside_the_outputs(self, label: list[int], found: str) -> None:
        with pytest.raises(InvalidBatch, match=r"0 to 2, or ignore_index \(-100\); .*" + found):
            Classification().nll(torch.randn(2, 3), torch.tensor(label))

    def test_label_outside_the_head(self) -> None:
        with pytest.raises(InvalidBatch, match=r"allowed_outputs \(4, 7\), 0 to 1.* found 4, 7"):
            Classification([4, 7]).nll(torch.randn(2, 9), torch.tensor([4, 7]))

    def test_label_outside_inside_vmap_and_where_it_only_marks_positions(self) -> None:
        logits, targets = torch.randn(5, 1, 3), torch.tensor([[0], [1], [2], [3], [0]])
        for function in (
            Classification().nll,
            Classification().sampled_nll,
            Classification().exact_terms,
        ):
            with pytest.raises(InvalidBatch, match="found 3"):
                torch.func.vmap(function, randomness="different")(logits, targets)

    def test_many_wrong_labels_are_abridged(self) -> None:
        with pytest.raises(InvalidBatch, match=r"found 3, 4, 5, 6, 7, \.\.\. \(17 in all\)"):
            Classification().nll(torch.randn(20, 3), torch.arange(20))

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
    def test_indices_of_another_type(self, dtype: torch.dtype) -> None:
        with pytest.raises(InvalidBatch, match=r"class indices, of an integer type; found Tensor"):
            Classification().nll(torch.randn(2, 3), torch.zeros(2, dtype=dtype))

    @pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 5, 1)])
    def test_indices_of_another_shape(self, shape: tuple[int, ...]) -> None:
        logits = torch.randn(2, *[3, 5, 6][: len(shape)])
        with pytest.raises(
            InvalidBatch, match="class indices for logits .* must have the shape"
        ) as error:
            Classification().nll(logits, torch.zeros(shape, dtype=torch.long))
        assert str(list(shape)) in str(error.value)
        assert str(list(logits.shape)) in str(error.value)

    @pytest.mark.parametrize("shape", [(), (2, 3, 4)])
    def test_another_number_of_dimensions(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InvalidBatch, match=r"indices \[2\], or .* \[2, 3\]; found"):
            Classification().nll(torch.randn(2, 3), torch.zeros(shape))

    def test_one_hot_over_another_number_of_classes(self) -> None:
        with pytest.raises(InvalidBatch, match=r"with 2 classes; found .* with 5\. .*columns"):
            Classification([0, 1]).nll(torch.randn(2, 5), torch.eye(5)[:2])

    def test_probabilities_of_other_samples_or_complex(self) -> None:
        for targets in (torch.eye(3), torch.eye(3)[:2] + 0j):
            with pytest.raises(InvalidBatch, match="same samples and positions"):
                Classification().nll(torch.randn(2, 3), targets)

    def test_indices_with_one_dimension_too_many(self) -> None:
        with pytest.raises(InvalidBatch, match=r"lambda t: t\[:, 0\]"):
            Classification().nll(torch.randn(2, 5), torch.zeros(2, 1, dtype=torch.long))

    @pytest.mark.parametrize(
        "row",
        [
            [0.5, 0.4, 0.0],
            [1.5, -0.5, 0.0],
            [math.nan, 0.5, 0.5],
            [math.inf, 0.0, 0.0],
            [math.inf, -math.inf, 1.0],
            [0.0, 0.0, 0.0],
            [1.0, 1.0, 0.0],
        ],
    )
    def test_not_probabilities(self, row: list[float]) -> None:
        with pytest.raises(InvalidBatch, match="with sum 1 over dimension 1"):
            Classification().nll(torch.randn(2, 3), torch.tensor([[0.0, 1.0, 0.0], row]))

    @pytest.mark.parametrize("row", [[1, 1, 0], [0, 0, 0], [2, -1, 0]])
    def test_not_one_hot(self, row: list[int]) -> None:
        with pytest.raises(InvalidBatch, match="several labels at once"):
            Classification().nll(torch.randn(1, 3), torch.tensor([row]))

    def test_transform_that_returns_something_else(self) -> None:
        likelihood = Classification(target_transform=lambda t: t.tolist())
        with pytest.raises(InvalidBatch, match="found list of 2 int from target_transform"):
            likelihood.nll(torch.randn(2, 3), torch.tensor([0, 1]))


class TestWrongOutputs:
    def test_one_dimension(self) -> None:
        with pytest.raises(InvalidBatch, match=r"must be logits \[N, C\]"):
            Classification().nll(torch.randn(3), torch.tensor([0, 1, 0]))

    def test_head_beyond_the_outputs(self) -> None:
        with pytest.raises(InvalidBatch, match=r"the 3 outputs, 0 to 2; found 5"):
            Classification([0, 5]).nll(torch.randn(2, 3), torch.tensor([0, 1]))


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("allowed", "found"),
        [([], "none"), ([0, 1, 0], "found 0 more than once"), ([0, -1], "found -1")],
    )
    def test_wrong_indices(self, allowed: list[int], found: str) -> None:
        with pytest.raises(ValueError, match=found):
            Classification(allowed)

    @pytest.mark.parametrize(
        "allowed", [3, "01", [0.0, 1.0], [True, False], torch.tensor([True]), torch.tensor([0.5])]
    )
    def test_no_indices(self, allowed: object) -> None:
        with pytest.raises(TypeError, match="must be the indices of a head's outputs"):
            Classification(allowed)

    def test_no_function(self) -> None:
        with pytest.raises(TypeError, match="target_transform must be a function; found 3"):
            Classification(target_transform=3)

    @pytest.mark.parametrize("value", [None, True, 1.0, "0"])
    def test_no_integer(self, value: object) -> None:
        with pytest.raises(TypeError, match="ignore_index must be an integer"):
            Classification(ignore_index=value)


def test_repr() -> None:
    assert repr(Classification([2, 3])) == (
        "Classification(allowed_outputs=(2, 3), target_transform=None, ignore_index=-100)"
    )


def test_sequences_are_a_time_series() -> None:
    with pytest.raises(InvalidBatch, match=r"TimeSeries\(Classification\(...\), batch_first=True"):
        Classification().nll(torch.randn(1, 7, 4), torch.zeros(1, 7, dtype=torch.long))
