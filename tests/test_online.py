import pytest
import torch
from torch import nn

from ewc import EWC, Classification, OnlineEWC
from tests._tasks import CLASSES, as_task, make_model, make_task, same, shift


def make_online(model=None, **options):
    model = make_model() if model is None else model
    return model, OnlineEWC(model, Classification(), **options)


def fisher_of(model, seed):
    ewc = EWC(model, Classification())
    ewc.consolidate(make_task(seed))
    return ewc.fisher


class TestArguments:
    @pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), float("inf"), True, "1", None])
    def test_row_01_decay(self, wrong):
        with pytest.raises((TypeError, ValueError), match=r"decay must be in \[0, 1\]; found"):
            make_online(decay=wrong)

    @pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), True, "1", None, [1.0]])
    def test_row_01_prior(self, wrong):
        with pytest.raises((TypeError, ValueError), match="prior_precision must be a finite"):
            make_online(prior_precision=wrong)

    @pytest.mark.parametrize(
        ("wrong", "what"),
        [
            ({"0.wieght": torch.ones(7, 5)}, r"'0\.wieght' \(nearest: '0\.weight'"),
            ({"0.weight": 1.0}, "has a float for a tensor"),
            ({"0.weight": torch.tensor(1.0)}, r"shape \(\), the parameter \(7, 5\).*broadcast"),
            ({"0.weight": torch.ones(1, 5)}, r"shape \(1, 5\)"),
            ({"0.bias": -torch.ones(7)}, "negative"),
            ({"0.bias": torch.full((7,), float("nan"))}, "NaN"),
            ({"0.bias": torch.full((7,), float("inf"))}, "infinite"),
            ({"0.bias": torch.ones(7, dtype=torch.cfloat)}, "complex64"),
            ({"0.bias": torch.ones(7, dtype=torch.bool)}, "bool"),
            ({3: torch.ones(7)}, "no parameter is named 3"),
        ],
    )
    def test_row_01_prior_by_name(self, wrong, what):
        with pytest.raises(ValueError, match=what):
            make_online(prior_precision=wrong)

    def test_no_decay_and_no_prior(self):
        with pytest.warns(UserWarning, match="every penalty 0") as caught:
            make_online(decay=0)
        assert len(caught) == 1
        assert caught[0].filename == __file__

    def test_no_decay_with_a_prior(self):
        make_online(decay=0.0, prior_precision=1.0)
        make_online(decay=0.0, prior_precision={"0.bias": torch.ones(7)})

    def test_prior_is_a_copy(self):
        prior = torch.ones(7)
        model, ewc = make_online(prior_precision={"0.bias": prior})
        ewc.consolidate(make_task())
        shift(model)
        expected = ewc().item()
        prior.mul_(100.0)
        ewc.state_dict()["prior_precision"]["0.bias"].mul_(100.0)
        ewc.consolidate(make_task())
        model.load_state_dict(dict(model.state_dict()))
        assert ewc.state_dict()["prior_precision"]["0.bias"].max() == 1.0
        assert expected > 0.0


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

    def test_row_37_not_collected_keeps_its_anchor_and_decays(self):
        model, ewc = make_online(decay=0.5)
        ewc.consolidate(make_task())
        fisher, anchor = as_task(ewc)
        shift(model)
        model[0].requires_grad_(False)
        ewc.consolidate(make_task(1))
        assert torch.equal(ewc.fisher["0.weight"], 0.5 * fisher["0.weight"])
        assert torch.equal(ewc.anchor["0.weight"], anchor["0.weight"])
        assert torch.equal(ewc.anchor["2.weight"], model[2].weight)

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
        model, ewc = make_online(decay=0.0, prior_precision=0.5)
        for seed in range(3):
            ewc.consolidate(make_task(seed))
        distance = 0.0
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        shift(model)
        for name, p in model.named_parameters():
            distance += (p.detach() - before[name]).square().sum().item()
        assert ewc().item() == pytest.approx(0.25 * distance, rel=1e-5)

    def test_row_37_enters_with_a_parameters_first_consolidation(self):
        model, ewc = make_online(decay=0.0, prior_precision=1.0)
        ewc.consolidate(make_task())
        model.append(nn.Linear(CLASSES, CLASSES))
        shift(model[3])
        assert ewc().item() == 0.0
        ewc.consolidate(make_task())
        shift(model[3])
        assert ewc().item() > 0.0

    @pytest.mark.parametrize("by_name", [False, True])
    def test_row_35_rows_gained_later(self, by_name):
        prior = {"2.bias": torch.ones(CLASSES)} if by_name else 1.0
        model, ewc = make_online(decay=0.0, prior_precision=prior)
        ewc.consolidate(make_task())

        bias = model[2].bias.detach()
        model[2].weight = nn.Parameter(torch.cat([model[2].weight.detach(), torch.ones(1, 7)]))
        model[2].bias = nn.Parameter(torch.cat([bias, torch.ones(1)]))
        assert ewc().item() == 0.0
        with torch.no_grad():
            model[2].bias[CLASSES] += 1.0
        assert ewc().item() == 0.0
        ewc.consolidate(make_task())
        with torch.no_grad():
            model[2].bias[CLASSES] += 1.0
        # A prior by name says nothing about a row that was not there.
        assert ewc().item() == (0.0 if by_name else 0.5)

    def test_row_24_25_follows_the_parameters_dtype(self):
        model, ewc = make_online(
            make_model(dtype=torch.bfloat16), prior_precision={"0.bias": torch.ones(7).double()}
        )
        ewc.consolidate([(x.bfloat16(), y) for x, y in make_task()])
        shift(model)
        assert ewc().dtype is torch.float32
        model.double()
        assert ewc().dtype is torch.float64
