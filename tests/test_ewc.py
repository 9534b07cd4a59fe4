import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ewc as package
from ewc import EWC, Classification, Likelihood, Regression
from tests import oracle
from tests.support.asserts import assert_close
from tests.support.tasks import make_ewc, make_task, same, shift, written_out


class TestSurface:
    def test_all(self):
        assert set(package.__all__) >= {"EWC", "OnlineEWC", "Likelihood", "Custom", "TimeSeries"}
        assert all(hasattr(package, name) for name in package.__all__)

    def test_is_a_plain_object(self):
        assert not isinstance(make_ewc()[1], nn.Module)

    def test_repr(self):
        _, ewc = make_ewc(strength=3.0)
        ewc.consolidate(make_task())
        assert repr(ewc) == (
            "EWC(strength=3, fisher_type='empirical', reduction='mean', n_tasks=1, parameters=4)"
        )


class TestArguments:
    def test_assigning_strength_changes_the_next_penalty(self):
        model, ewc = make_ewc(strength=1.0)
        ewc.consolidate(make_task())
        shift(model)
        before = ewc().item()
        ewc.strength = 3
        assert ewc().item() == pytest.approx(3 * before)


class TestPenalty:
    def test_equals_the_sum_written_out(self):
        model, ewc = make_ewc(strength=7.0)
        tasks = []
        for seed in range(4):
            shift(model, seed)
            task = make_task(seed)
            tasks.append((oracle.fisher(model, task), copy.deepcopy(dict(model.state_dict()))))
            ewc.consolidate(task)
        shift(model, 9)
        expected = written_out(tasks, model, 7.0)
        assert ewc.n_tasks == 4
        assert ewc().item() == pytest.approx(expected.item(), rel=1e-4)
        found = torch.autograd.grad(ewc(), list(model.parameters()))
        exact = torch.autograd.grad(expected, list(model.parameters()))
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)

    def test_training_stays_near_the_anchor(self):
        def penalty_after_training(strength):
            model, ewc = make_ewc(strength=strength)
            ewc.consolidate(make_task())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            (x, y), *_ = make_task(1)
            for _ in range(20):
                optimizer.zero_grad()
                (F.cross_entropy(model(x), y) + ewc()).backward()
                optimizer.step()
            ewc.strength = 1.0
            return ewc().item()

        assert 0.0 < penalty_after_training(10.0) < 0.5 * penalty_after_training(0.0)


class TestConsolidate:
    def test_fisher_and_anchor(self):
        model, ewc = make_ewc()
        task = make_task()
        expected = oracle.fisher(model, task)
        summary = ewc.consolidate(task)
        assert_close(ewc.fisher, expected)
        assert same(ewc.anchor, dict(model.state_dict()))
        assert ewc.n_tasks == summary.n_tasks == 1
        assert summary.samples == 8
        assert summary.trace == pytest.approx(sum(f.sum().item() for f in expected.values()), 1e-4)
        assert summary.largest == pytest.approx(
            max(f.max().item() for f in expected.values()), 1e-4
        )
        assert list(summary.paths) == list(expected)

    def test_summary_is_that_of_the_penalty(self):
        _, ewc = make_ewc()
        first = ewc.consolidate(make_task())
        second = ewc.consolidate(make_task())
        assert second.largest == pytest.approx(2 * first.largest)

    def test_twice_is_two_tasks(self):
        _, ewc = make_ewc()
        ewc.consolidate(make_task())
        once = ewc.fisher
        ewc.consolidate(make_task())
        assert ewc.n_tasks == 2
        assert_close(ewc.fisher, {name: 2 * one for name, one in once.items()})

    def test_arguments_for_one_task(self):
        _, ewc = make_ewc()
        task = make_task()

        def forward(model, batch):
            return 2 * model(batch[0])

        ewc.consolidate([(x, y.clamp(max=1)) for x, y in task], likelihood=Classification([0, 1]))
        assert not ewc.fisher["2.weight"][2].any()
        before = ewc.fisher
        ewc.consolidate(task, forward=forward)
        _, other = make_ewc(forward=forward)
        other.consolidate(task)
        for name, one in other.fisher.items():
            torch.testing.assert_close(ewc.fisher[name] - before[name], one, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
    def test_fisher_types(self, fisher_type):
        _, ewc = make_ewc(fisher_type=fisher_type)
        ewc.consolidate(make_task(), generator=torch.Generator().manual_seed(0))
        assert all(one.any() for one in ewc.fisher.values())

    def test_chosen_parameters(self):
        model, ewc = make_ewc(parameters=["2.bias", "0.weight"])
        ewc.consolidate(make_task())
        assert list(ewc.fisher) == ["0.weight", "2.bias"]
        shift(model)
        ewc().backward()
        assert model[2].weight.grad is None

    def test_constant_of_a_task_is_exact(self):
        model, ewc = make_ewc()
        tasks = []
        for seed in range(2):
            shift(model, seed)
            ewc.consolidate(make_task(seed))
            tasks.append((oracle.fisher(model, make_task(seed)), dict(model.state_dict())))
            tasks[-1] = copy.deepcopy(tasks[-1])
        assert ewc().item() == pytest.approx(
            written_out(tasks, model, ewc.strength).item(), rel=1e-4
        )


class TestReduction:
    """`"sum"` is N times `"mean"`."""

    @staticmethod
    def ratio(batches, expected, **options):
        size = options.pop("dataset_size", None)
        _, mean = make_ewc(max_samples=options.get("max_samples"))
        mean.consolidate(batches)
        _, ewc = make_ewc(reduction="sum", **options)
        ewc.consolidate(batches, dataset_size=size)
        for name, one in mean.fisher.items():
            torch.testing.assert_close(ewc.fisher[name], expected * one, rtol=1e-5, atol=0)

    def test_samples_seen(self):
        self.ratio(make_task(), 8)

    def test_max_samples_that_cuts_nothing(self):
        self.ratio(make_task(), 8, max_samples=100)

    def test_dataset_size(self):
        self.ratio(make_task(), 1000, dataset_size=1000)

    def test_length_of_the_dataset(self):
        x, y = make_task(size=30)[0]
        dataset = torch.utils.data.TensorDataset(x, y)
        self.ratio(torch.utils.data.DataLoader(dataset, batch_size=4), 30, max_samples=8)


class TestForget:
    def test_releases_until_the_next_consolidation(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        ewc.forget("0.weight", "2.bias")
        assert list(ewc.fisher) == ["0.bias", "2.weight"]
        shift(model)
        ewc().backward()
        assert model[0].weight.grad is None
        ewc.consolidate(make_task())
        assert list(ewc.fisher) == list(dict(model.named_parameters()))

    def test_drops_its_constant(self):
        model, ewc = make_ewc()
        for seed in range(2):
            shift(model, seed)
            ewc.consolidate(make_task(seed))
        assert ewc().item() > 0.0
        ewc.forget(*ewc.fisher)
        assert ewc().item() == 0.0
        assert ewc.n_tasks == 2


class TestRegression:
    def test_another_likelihood(self):
        model = nn.Linear(2, 1)
        ewc = EWC(model, Regression())
        x = torch.randn(6, 2)
        ewc.consolidate([(x, torch.zeros(6, 1))])
        residual = (model(x).detach()) ** 2
        torch.testing.assert_close(ewc.fisher["weight"], (residual * x**2).mean(0, keepdim=True))

    def test_of_ones_own(self):
        class Poisson(Likelihood):
            def nll(self, outputs, *rest):
                return F.poisson_nll_loss(outputs, rest[0], reduction="none").sum(1)

        model = nn.Linear(2, 1)
        ewc = EWC(model, Poisson())
        x = torch.randn(6, 2)
        ewc.consolidate([(x, torch.ones(6, 1))])
        slope = model(x).detach().exp() - 1.0
        torch.testing.assert_close(ewc.fisher["weight"], (slope**2 * x**2).mean(0, keepdim=True))
