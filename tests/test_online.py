import pytest
import torch

from ewc import EWC, Classification, OnlineEWC
from tests.support.asserts import raises, unchanged
from tests.support.tasks import as_task, make_model, make_task, same, shift


def make_online(model=None, **options):
    model = make_model() if model is None else model
    return model, OnlineEWC(model, Classification(), **options)


def fisher_of(model, seed):
    ewc = EWC(model, Classification())
    ewc.consolidate(make_task(seed))
    return ewc.fisher


class TestArguments:
    def test_prior_is_a_copy(self):
        prior = torch.ones(7)
        model, ewc = make_online(prior_precision={"0.bias": prior})
        ewc.consolidate(make_task())
        shift(model)
        expected = ewc().item()
        prior.mul_(100.0)
        state = ewc.state_dict()
        state["prior_precision"]["0.bias"].mul_(100.0)
        ewc.load_state_dict(ewc.state_dict())  # the penalty's curvature is computed again
        assert ewc().item() == expected
        assert torch.equal(ewc.state_dict()["prior_precision"]["0.bias"], torch.ones(7))


class TestRecursion:
    @pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
    def test_fisher_and_penalty(self, decay):
        prior = 0.25
        model, ewc = make_online(strength=3.0, decay=decay, prior_precision=prior)
        expected = None
        for seed in range(3):
            shift(model, seed)
            new = fisher_of(model, seed)
            expected = {
                name: one + decay * (0.0 if expected is None else expected[name])
                for name, one in new.items()
            }
            anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
            ewc.consolidate(make_task(seed))
            for name, one in expected.items():
                torch.testing.assert_close(ewc.fisher[name], one)
            assert same(ewc.anchor, anchor)
        shift(model, 9)
        penalty = 1.5 * sum(
            ((decay * expected[name] + prior) * (p - anchor[name]) ** 2).sum()
            for name, p in model.named_parameters()
        )
        assert ewc().item() == pytest.approx(penalty.item(), rel=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(ewc(), list(model.parameters())),
            torch.autograd.grad(penalty, list(model.parameters())),
        )

    def test_calling_changes_nothing(self):
        model, ewc = make_online(decay=0.5)
        ewc.consolidate(make_task())
        shift(model)
        fisher, _ = as_task(ewc)
        values = {ewc().item() for _ in range(5)}
        assert len(values) == 1
        assert same(ewc.fisher, fisher)

    def test_first_task_with_decay_one_equals_ewc(self):
        model, ewc = make_online()
        other = EWC(model, Classification())
        ewc.consolidate(make_task())
        other.consolidate(make_task())
        shift(model)
        assert torch.equal(ewc(), other())

    def test_summary_is_of_the_curvature_in_the_penalty(self):
        _, ewc = make_online(decay=0.5, prior_precision=0.25)
        summary = ewc.consolidate(make_task())
        curvature = torch.cat([(0.5 * f + 0.25).flatten() for f in ewc.fisher.values()])
        assert summary.largest == pytest.approx(curvature.max().item())
        assert summary.trace == pytest.approx(curvature.sum().item(), rel=1e-5)


class TestPrior:
    def test_by_name(self):
        prior = torch.rand(7)
        model, ewc = make_online(decay=0.0, prior_precision={"0.bias": prior}, strength=2.0)
        assert ewc().item() == 0.0
        ewc.consolidate(make_task())
        anchor = ewc.anchor["0.bias"]
        shift(model)
        expected = (prior * (model[0].bias - anchor) ** 2).sum()
        assert ewc().item() == pytest.approx(expected.item(), rel=1e-5)

    def test_enters_once(self):
        model, ewc = make_online(decay=0.0, prior_precision=0.5, strength=1.0)
        for seed in range(3):
            ewc.consolidate(make_task(seed))
        distance = 0.0
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        shift(model)
        for name, p in model.named_parameters():
            distance += (p.detach() - before[name]).square().sum().item()
        assert ewc().item() == pytest.approx(0.25 * distance, rel=1e-5)


@pytest.mark.parametrize(
    "prior", [1e39, {"0.bias": torch.full((7,), 1e39, dtype=torch.float64)}], ids=["number", "dict"]
)
@pytest.mark.parametrize("strength", ["auto", 1.0])
def test_a_prior_that_overflows_in_the_dtype_of_the_parameters(prior, strength):
    model = make_model()
    ewc = OnlineEWC(model, Classification(), strength=strength, prior_precision=prior)
    with (
        unchanged(ewc, model),
        raises(ValueError, "curvature", "finite", "'0.bias'", "Fix: use a smaller prior_precision"),
    ):
        ewc.consolidate(make_task())


def test_a_state_that_leaves_rows_with_a_prior_free():
    prior = {"2.bias": torch.full((3,), 2.0)}
    model, ewc = make_online(decay=0.5, prior_precision=prior, strength=1.0)
    ewc.consolidate(make_task())
    state = ewc.state_dict()
    state["free_rows"]["2.bias"] = 1
    ewc.load_state_dict(state)
    assert ewc.fisher["2.bias"].shape == (2,)
    with torch.no_grad():
        model[2].bias.add_(1.0)
    assert ewc().item() == pytest.approx(
        0.5 * (0.5 * ewc.fisher["2.bias"] + 2.0).sum().item(), rel=1e-5
    )


def test_a_consolidation_per_batch_gives_a_moving_average():
    alpha = 0.3
    model = make_model()
    average = OnlineEWC(model, Classification(), decay=1 - alpha)
    expected = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    for batch in make_task(batches=5):
        shift(model)
        average.consolidate([batch], weight=alpha)
        alone = EWC(model, Classification())
        alone.consolidate([batch])
        for name, each in alone.fisher.items():
            expected[name] = alpha * each + (1 - alpha) * expected[name]
    torch.testing.assert_close(average.fisher, expected)
    regularizer = OnlineEWC(model, Classification(), decay=1 - alpha)
    regularizer.load_state_dict(average.state_dict())
    assert same(regularizer.anchor, dict(model.named_parameters()))
