import copy
import gc
import pickle
import re
import warnings
import weakref

import pytest
import torch
import torch._dynamo.testing
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import ewc as package
import ewc._ewc as module
from ewc import EWC, Classification, Custom, Likelihood, OnlineEWC, Regression, ZeroFisherWarning
from tests._tasks import (
    CLASSES,
    INPUTS,
    as_task,
    make_ewc,
    make_model,
    make_task,
    same,
    same_state,
    shift,
    written_out,
)

KINDS = pytest.mark.parametrize("kind", [EWC, OnlineEWC])
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")


def explicit_fisher(model, task, names=None):
    """One sample at a time."""
    names = list(dict(model.named_parameters())) if names is None else names
    parameters = [dict(model.named_parameters())[name] for name in names]
    sums = [torch.zeros_like(p) for p in parameters]
    samples = 0
    for x, y in task:
        for one, target in zip(x, y, strict=True):
            nll = F.cross_entropy(model(one[None]), target[None])
            for total, gradient in zip(sums, torch.autograd.grad(nll, parameters), strict=True):
                total += gradient**2
            samples += 1
    return {name: total / samples for name, total in zip(names, sums, strict=True)}


def assert_close(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


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
    @pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), True, "1", None, 1j])
    def test_row_01_strength(self, wrong):
        with pytest.raises((TypeError, ValueError), match="strength must be a finite number >= 0"):
            make_ewc(strength=wrong)
        _, ewc = make_ewc(strength=2.0)
        with pytest.raises((TypeError, ValueError), match="strength"):
            ewc.strength = wrong
        assert ewc.strength == 2.0

    def test_row_02_strength_zero(self):
        model, ewc = make_ewc(strength=0.0)
        ewc.consolidate(make_task())
        shift(model)
        assert ewc().item() == 0.0
        ewc().backward()
        assert not any(p.grad.any() for p in model.parameters())

    def test_assigning_strength_changes_the_next_penalty(self):
        model, ewc = make_ewc(strength=1.0)
        ewc.consolidate(make_task())
        shift(model)
        before = ewc().item()
        ewc.strength = 3
        assert ewc().item() == pytest.approx(3 * before)

    @pytest.mark.parametrize(
        "model", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)], ids=["none", "frozen"]
    )
    def test_row_03_no_parameter(self, model):
        with pytest.raises(ValueError, match="parameter to protect"):
            EWC(model, Classification())

    def test_row_03_no_name(self):
        with pytest.raises(ValueError, match=r"parameter to protect.*names given"):
            make_ewc(parameters=[])

    def test_row_03_all_frozen_later(self):
        model, ewc = make_ewc()
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="parameter to protect"):
            ewc.consolidate(make_task())

    def test_row_04_unknown_name(self):
        with pytest.raises(ValueError, match=r"'2\.wight'.*'2\.weight'"):
            make_ewc(parameters=["2.wight"])

    def test_row_05_lazy(self):
        with pytest.raises(ValueError, match=r"'0\.weight' is lazy. Run a forward first"):
            EWC(nn.Sequential(nn.LazyLinear(3)), Classification())

    def test_row_05_meta(self):
        with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device. Materialise"):
            EWC(make_model(device="meta"), Classification())

    def test_row_05_lazy_module_added_later(self):
        model, ewc = make_ewc()
        model.append(nn.LazyLinear(2))
        with pytest.raises(ValueError, match=r"'3\.weight' is lazy"):
            ewc.consolidate(make_task())

    def test_model(self):
        with pytest.raises(TypeError, match=r"nn\.Module; found function"):
            EWC(lambda x: x, Classification())

    def test_likelihood(self):
        with pytest.raises(TypeError, match=r"Custom\(nll\)"):
            EWC(make_model(), F.cross_entropy)

    @pytest.mark.parametrize(
        ("name", "allowed"),
        [("fisher_type", "'empirical', 'exact', 'mc'"), ("reduction", "'mean', 'sum'")],
    )
    @pytest.mark.parametrize("wrong", ["other", 3, None])
    def test_choices(self, name, allowed, wrong):
        with pytest.raises(ValueError, match=f"{name} must be one of {allowed}; found"):
            make_ewc(**{name: wrong})

    @pytest.mark.parametrize(("kind", "define"), [("exact", "exact_terms"), ("mc", "sample")])
    def test_likelihood_that_lacks_what_the_type_needs(self, kind, define):
        likelihood = Custom(lambda outputs, targets: outputs.sum(1))
        with pytest.raises(ValueError, match=f"{define}.*Custom does not"):
            EWC(make_model(), likelihood, fisher_type=kind)
        _, ewc = make_ewc(fisher_type=kind)
        with pytest.raises(ValueError, match=define):
            ewc.consolidate(make_task(), likelihood=likelihood)

    @pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "3"])
    def test_positive_integers(self, wrong):
        with pytest.raises((TypeError, ValueError), match="max_samples must be a positive integer"):
            make_ewc(max_samples=wrong)
        _, ewc = make_ewc(reduction="sum")
        with pytest.raises((TypeError, ValueError), match="dataset_size must be a positive"):
            ewc.consolidate(make_task(), dataset_size=wrong)

    def test_forward(self):
        with pytest.raises(TypeError, match="forward must be a function"):
            make_ewc(forward=3)
        _, ewc = make_ewc()
        with pytest.raises(TypeError, match="forward must be a function"):
            ewc.consolidate(make_task(), forward="model")

    def test_consolidate(self):
        _, ewc = make_ewc()
        with pytest.raises(TypeError, match="batches must be an iterable of batches"):
            ewc.consolidate(3)
        with pytest.raises(TypeError, match=r"torch\.Generator"):
            ewc.consolidate(make_task(), generator=0)
        with pytest.raises(TypeError, match="likelihood"):
            ewc.consolidate(make_task(), likelihood="softmax")


class TestPenalty:
    @KINDS
    def test_row_06_before_the_first_consolidation(self, kind):
        model = make_model(dtype=torch.float64)
        ewc = kind(model, Classification())
        penalty = ewc()
        assert penalty.item() == 0.0
        assert penalty.shape == ()
        assert penalty.dtype is torch.float64
        (model(torch.ones(1, INPUTS, dtype=torch.float64)).sum() + penalty).backward()

    @KINDS
    def test_row_07_at_the_anchor(self, kind):
        model = make_model()
        ewc = kind(model, Classification(), strength=1e6)
        ewc.consolidate(make_task())
        assert ewc().item() == 0.0
        ewc().backward()
        assert not any(p.grad.any() for p in model.parameters())

    def test_row_07_at_the_anchor_of_many_online_tasks(self):
        model = make_model()
        ewc = OnlineEWC(model, Classification(), decay=0.9, prior_precision=0.1)
        for seed in range(3):
            shift(model, seed)
            ewc.consolidate(make_task(seed))
            assert ewc().item() == 0.0

    def test_row_08_after_a_step_in_place(self):
        model, ewc = make_ewc()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ewc.consolidate(make_task())
        (x, y), *_ = make_task(1)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert ewc().item() > 0.0

    def test_equals_the_sum_written_out(self):
        model, ewc = make_ewc(strength=7.0)
        tasks = []
        for seed in range(4):
            shift(model, seed)
            task = make_task(seed)
            tasks.append((explicit_fisher(model, task), copy.deepcopy(dict(model.state_dict()))))
            ewc.consolidate(task)
        shift(model, 9)
        expected = written_out(tasks, model, 7.0)
        assert ewc.n_tasks == 4
        assert ewc().item() == pytest.approx(expected.item(), rel=1e-4)
        found = torch.autograd.grad(ewc(), list(model.parameters()))
        exact = torch.autograd.grad(expected, list(model.parameters()))
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)

    def test_trains(self):
        model, ewc = make_ewc(strength=100.0)
        ewc.consolidate(make_task())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        (x, y), *_ = make_task(1)
        for _ in range(3):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + ewc()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        assert 0.0 < ewc().item() < float("inf")

    def test_under_no_grad_and_inference_mode(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        shift(model)
        expected = ewc().item()
        ewc = pickle.loads(pickle.dumps(ewc))
        with torch.no_grad():
            assert ewc().item() == expected
        # What the first call keeps must be of use outside.
        ewc = pickle.loads(pickle.dumps(ewc))
        with torch.inference_mode():
            assert ewc().item() == expected
        ewc().backward()

    def test_row_24_half_precision_parameters(self):
        model, ewc = make_ewc(make_model(dtype=torch.bfloat16))
        task = [(x.bfloat16(), y) for x, y in make_task()]
        ewc.consolidate(task)
        shift(model)
        assert all(one.dtype is torch.float32 for one in ewc.fisher.values())
        expected = written_out([as_task(ewc)], model, 1.0).item()
        assert ewc().dtype is torch.float32
        assert ewc().item() == pytest.approx(expected, rel=1e-5)
        ewc().backward()
        assert all(p.grad.dtype is torch.bfloat16 for p in model.parameters())

    def test_row_24_under_autocast(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        shift(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = ewc()
        assert torch.equal(inside, ewc())

    def test_row_37_frozen_later_is_still_counted(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        shift(model)
        expected = ewc().item()
        fisher, anchor = as_task(ewc)
        model[0].requires_grad_(False)
        assert ewc().item() == expected
        ewc().backward()
        assert model[0].weight.grad is None
        assert model[2].weight.grad is not None
        # Not collected: as it was.
        ewc.consolidate(make_task(1))
        assert torch.equal(ewc.fisher["0.weight"], fisher["0.weight"])
        assert torch.equal(ewc.anchor["0.weight"], anchor["0.weight"])
        assert not torch.equal(ewc.fisher["2.weight"], fisher["2.weight"])

    def test_row_38_sparse_embedding(self):
        def consolidated(sparse):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(6, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))
            ewc = EWC(model, Classification())
            ewc.consolidate([(torch.tensor([[0, 1], [1, 1], [4, 2]]), torch.tensor([0, 1, 2]))])
            shift(model)
            return model, ewc

        (dense_model, dense), (sparse_model, sparse) = consolidated(False), consolidated(True)
        assert_close(sparse.fisher, dense.fisher)
        assert sparse().item() == pytest.approx(dense().item())
        x, y = torch.tensor([[0, 1]]), torch.tensor([2])
        for model, ewc in ((dense_model, dense), (sparse_model, sparse)):
            (F.cross_entropy(model(x), y) + ewc()).backward()
        torch.testing.assert_close(
            sparse_model[0].weight.grad.to_dense(), dense_model[0].weight.grad
        )

    def test_row_38_complex_parameter(self):
        class Wave(nn.Module):
            def __init__(self):
                super().__init__()
                generator = torch.Generator().manual_seed(0)
                weight = torch.randn(INPUTS, CLASSES, dtype=torch.cfloat, generator=generator)
                self.weight = nn.Parameter(weight)

            def forward(self, x):
                outputs = x.to(torch.cfloat) @ self.weight
                return outputs.real + outputs.imag**2

        model, ewc = make_ewc(Wave())
        ewc.consolidate(make_task())
        fisher, anchor = ewc.fisher["weight"], ewc.anchor["weight"]
        assert fisher.dtype is torch.float32
        assert (fisher >= 0).all()
        with torch.no_grad():
            model.weight.add_(0.1 + 0.2j)
        expected = 0.5 * (fisher * (model.weight - anchor).abs() ** 2).sum()
        assert ewc().item() == pytest.approx(expected.item())
        torch.testing.assert_close(
            torch.autograd.grad(ewc(), model.weight), torch.autograd.grad(expected, model.weight)
        )

    def test_row_44_two_penalties(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        shift(model)
        one, other = ewc(), ewc()
        one.backward()
        first = [p.grad.clone() for p in model.parameters()]
        other.backward()
        for parameter, gradient in zip(model.parameters(), first, strict=True):
            torch.testing.assert_close(parameter.grad, 2 * gradient)

    def test_row_44_create_graph(self):
        model, ewc = make_ewc(strength=3.0)
        ewc.consolidate(make_task())
        shift(model)
        gradients = torch.autograd.grad(ewc(), list(model.parameters()), create_graph=True)
        norm = sum((gradient**2).sum() for gradient in gradients)
        for parameter, name in zip(model.parameters(), ewc.fisher, strict=True):
            (second,) = torch.autograd.grad(norm, parameter, retain_graph=True)
            distance = (parameter - ewc.anchor[name]).detach()
            torch.testing.assert_close(second, 2 * (3.0 * ewc.fisher[name]) ** 2 * distance)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
class TestRow45:
    """Inside a compiled training step."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
        torch._dynamo.reset()

    @KINDS
    def test_row_45_same_value_and_gradient(self, backend, kind):
        model = make_model()
        options = {} if kind is EWC else {"decay": 0.9, "prior_precision": 0.1}
        ewc = kind(model, Classification(), **options)
        (x, y), *_ = make_task(5)

        def step():
            return F.cross_entropy(model(x), y) + ewc()

        def check():
            found = compiled()
            expected = step()
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(
                torch.autograd.grad(found, list(model.parameters())),
                torch.autograd.grad(expected, list(model.parameters())),
            )

        compiled = torch.compile(step, fullgraph=True, backend=backend)
        check()
        for seed in range(3):
            ewc.consolidate(make_task(seed))
            shift(model, seed)
            check()
        for strength in (2.0, 3.0, 0.0):
            ewc.strength = strength
            check()

    def test_row_45_follows_a_replaced_and_a_grown_parameter(self, backend):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        shift(model)
        compiled = torch.compile(lambda: ewc(), fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(), ewc())
        model[0].weight = nn.Parameter(model[0].weight.detach() + 1.0)
        torch.testing.assert_close(compiled(), ewc())
        grow(model)
        torch.testing.assert_close(compiled(), ewc())

    def test_row_45_after_deepcopy_and_of_a_compiled_model(self, backend):
        model = make_model()
        wrapped = torch.compile(model, backend=backend)
        ewc = EWC(wrapped, Classification())
        ewc.consolidate(make_task())
        shift(model)
        expected = ewc().item()
        other = copy.deepcopy(ewc)
        compiled = torch.compile(lambda: other(), fullgraph=True, backend=backend)
        assert compiled().item() == pytest.approx(expected)


def test_row_45_tasks_and_strengths_do_not_compile_anew():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model, ewc = make_ewc()
    compiled = torch.compile(lambda: ewc(), fullgraph=True, backend=counter)
    for seed in range(12):
        ewc.consolidate(make_task(seed))
        shift(model, seed)
        torch.testing.assert_close(compiled(), ewc())
    for strength in (2.0, 3.0, 0.0, 1.0, 7.0):
        ewc.strength = strength
        compiled()
    # The first task, a first change of the constants, a first change of the strength.
    assert counter.frame_count <= 3
    torch._dynamo.reset()


def grow(model, rows=2):
    """Give the head more outputs."""
    old = model[2]
    new = nn.Linear(old.in_features, old.out_features + rows)
    with torch.no_grad():
        new.weight[: old.out_features] = old.weight
        new.bias[: old.out_features] = old.bias
    model[2] = new


class TestConsolidate:
    def test_fisher_and_anchor(self):
        model, ewc = make_ewc()
        task = make_task()
        expected = explicit_fisher(model, task)
        summary = ewc.consolidate(task)
        assert_close(ewc.fisher, expected)
        assert same(ewc.anchor, dict(model.state_dict()))
        assert ewc.n_tasks == summary.task == 1
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

    def test_returned_tensors_are_copies(self):
        _, ewc = make_ewc()
        ewc.consolidate(make_task())
        fisher, anchor = as_task(ewc)
        for tensor in (*ewc.fisher.values(), *ewc.anchor.values()):
            tensor.zero_()
        assert same_state(ewc, fisher, anchor)

    def test_row_19_grad_is_untouched(self):
        model, ewc = make_ewc()
        grad = torch.randn_like(model[0].weight)
        model[0].weight.grad = grad
        before = grad.clone()
        ewc.consolidate(make_task())
        assert model[0].weight.grad is grad
        assert torch.equal(grad, before)
        assert all(p.grad is None for p in (model[0].bias, model[2].weight, model[2].bias))

    def test_row_20_step_fused_into_backward(self):
        model, ewc = make_ewc()
        steps = []

        def hook(parameter):
            steps.append(parameter)
            with torch.no_grad():
                parameter.add_(1.0)

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(hook)
        before = copy.deepcopy(dict(model.state_dict()))
        ewc.consolidate(make_task())
        assert not steps
        assert same(dict(model.state_dict()), before)
        assert same(ewc.anchor, before)

    def test_row_33_tied_weights(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.Tanh(), nn.Linear(INPUTS, INPUTS))
        model[2].weight = model[0].weight
        ewc = EWC(model, Classification())
        task = make_task()
        ewc.consolidate(task)
        assert list(ewc.fisher) == ["0.weight", "0.bias", "2.bias"]
        assert_close(ewc.fisher, explicit_fisher(model, task))
        shift(model)
        assert ewc().item() == pytest.approx(written_out([as_task(ewc)], model, 1.0).item())

    def test_row_33_tied_later(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.Tanh(), nn.Linear(INPUTS, INPUTS))
        ewc = EWC(model, Classification())
        ewc.consolidate(make_task())
        fisher, anchor = as_task(ewc)
        model[2].weight = model[0].weight
        # Both old anchors pull at the parameter that has taken both names.
        both = (model[0].weight, model[2].weight)
        expected = 0.5 * sum(
            (fisher[name] * (p - anchor[name]) ** 2).sum()
            for name, p in zip(("0.weight", "2.weight"), both, strict=True)
        )
        assert ewc().item() == pytest.approx(expected.item())
        torch.testing.assert_close(
            torch.autograd.grad(ewc(), both[0]), torch.autograd.grad(expected, both[0])
        )

    def test_row_33_chosen_and_tied_later(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.Tanh(), nn.Linear(INPUTS, INPUTS))
        ewc = EWC(model, Classification(), parameters=["0.weight", "2.weight"])
        model[2].weight = model[0].weight
        ewc.consolidate(make_task())
        assert list(ewc.fisher) == ["0.weight"]

    def test_constant_of_a_task_is_exact(self):
        model, ewc = make_ewc()
        tasks = []
        for seed in range(2):
            shift(model, seed)
            ewc.consolidate(make_task(seed))
            tasks.append((explicit_fisher(model, make_task(seed)), dict(model.state_dict())))
            tasks[-1] = copy.deepcopy(tasks[-1])
        assert ewc().item() == pytest.approx(written_out(tasks, model, 1.0).item(), rel=1e-4)

    def test_row_23_under_no_grad_and_inference_mode(self):
        model, ewc = make_ewc()
        expected = explicit_fisher(model, make_task())
        for mode in (torch.no_grad, torch.inference_mode):
            other = EWC(model, Classification())
            with mode():
                other.consolidate(make_task())
                state = other.state_dict()
            assert_close(other.fisher, expected)
            # What was made inside must be of use outside.
            other().backward()
            ewc.load_state_dict(state)
            ewc().backward()


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

    def test_unknown(self):
        _, ewc = make_ewc(reduction="sum", max_samples=3)
        with pytest.raises(ValueError, match="Pass dataset_size"):
            ewc.consolidate(make_task())
        assert ewc.n_tasks == 0
        assert not ewc.fisher

    def test_overflow(self):
        _, ewc = make_ewc(reduction="sum")
        with pytest.raises(ValueError, match=r"'0\.weight'.*overflows.*reduction=\"mean\""):
            ewc.consolidate(make_task(), dataset_size=10**60)
        assert ewc.n_tasks == 0


class Ignored(nn.Module):
    """A model with two parameters that do not matter."""

    def __init__(self):
        super().__init__()
        self.body = make_model()
        self.unused = nn.Parameter(torch.ones(3))
        self.multiplied = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x):
        return self.body(x) + 0.0 * self.multiplied


class TestRow16:
    def test_row_16_one_warning_per_name_ever(self):
        _, ewc = make_ewc(Ignored())
        with pytest.warns(ZeroFisherWarning) as caught:
            ewc.consolidate(make_task())
        texts = [str(one.message) for one in caught]
        assert len(texts) == 2
        assert "'unused'" in texts[0]
        assert "'multiplied'" in texts[1]
        assert caught[0].filename == __file__
        ewc.consolidate(make_task())
        copy.deepcopy(ewc).consolidate(make_task())
        assert not ewc.fisher["unused"].any()

    def test_row_16_a_warning_turned_error_changes_nothing(self):
        _, ewc = make_ewc(Ignored())
        for _ in range(2):
            with pytest.raises(ZeroFisherWarning):
                ewc.consolidate(make_task())
            assert ewc.n_tasks == 0
            assert not ewc.fisher

    def test_row_16_all_zero(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        fisher, anchor = as_task(ewc)
        shift(model)
        with pytest.raises(ValueError, match="Fisher of every parameter is zero"):
            ewc.consolidate(make_task(), likelihood=Custom(lambda y, t: 0.0 * y.sum(1)))
        assert ewc.n_tasks == 1
        assert same_state(ewc, fisher, anchor)


class TestAllOrNothing:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("step", ["collect", "snapshot", "in_order", "Binding", "State"])
    def test_error_anywhere(self, monkeypatch, error, step):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        fisher, anchor = as_task(ewc)
        shift(model)
        expected = ewc().item()

        def fail(*args, **kwargs):
            raise error("stop")

        with monkeypatch.context() as patch:
            patch.setattr(module, step, fail)
            with pytest.raises(error, match="stop"):
                ewc.consolidate(make_task(1))
        assert ewc.n_tasks == 1
        assert same_state(ewc, fisher, anchor)
        assert ewc().item() == expected

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_error_of_the_loader(self, error):
        _, ewc = make_ewc()

        def batches():
            yield make_task()[0]
            raise error("stop")

        with pytest.raises(error, match="stop"):
            ewc.consolidate(batches())
        assert ewc.n_tasks == 0
        assert not ewc.fisher
        assert ewc().item() == 0.0


class TestFollowing:
    def test_row_25_another_dtype(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        shift(model)
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
        ewc().backward()

    @pytest.mark.gpu
    @GPU
    def test_row_25_another_device(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        shift(model)
        expected = ewc().item()
        model.cuda()
        assert all(one.is_cuda for one in ewc.fisher.values())
        assert ewc().is_cuda
        assert ewc().item() == pytest.approx(expected, rel=1e-5)
        ewc.consolidate(make_task(1))
        assert all(one.is_cuda for one in ewc.anchor.values())
        ewc().backward()

    @pytest.mark.gpu
    @GPU
    def test_row_26_several_devices(self):
        class Split(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = make_model()[:2].cuda()
                self.second = make_model()[2]

            def forward(self, x):
                return self.second(self.first(x.cuda()).cpu())

        model, ewc = make_ewc(Split())
        ewc.consolidate(make_task())
        reference_model, reference = make_ewc()
        reference.consolidate(make_task())
        shift(model)
        shift(reference_model)
        assert ewc().device == model.first[0].weight.device
        assert ewc().item() == pytest.approx(reference().item(), rel=1e-4)
        ewc().backward()

    @pytest.mark.gpu
    @GPU
    def test_row_27_batch_on_another_device(self):
        _, ewc = make_ewc(make_model().cuda())
        ewc.consolidate(make_task())
        _, reference = make_ewc()
        reference.consolidate(make_task())
        assert_close({n: f.cpu() for n, f in ewc.fisher.items()}, reference.fisher)

    @pytest.mark.parametrize("what", ["parameter", "module", "data"])
    def test_row_34_replaced(self, what):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        assert ewc().item() == 0.0
        new = nn.Linear(INPUTS, 7)
        if what == "parameter":
            model[0].weight = new.weight
        elif what == "module":
            model[0] = new
        else:
            model[0].weight.data = new.weight.detach()
        expected = written_out([as_task(ewc)], model, 1.0).item()
        assert ewc().item() == pytest.approx(expected)
        ewc().backward()
        assert model[0].weight.grad.any()
        ewc.consolidate(make_task(1))
        assert ewc.n_tasks == 2

    @KINDS
    def test_row_35_grown_head(self, kind):
        model = make_model()
        ewc = kind(model, Classification())
        ewc.consolidate(make_task())
        old, anchor = as_task(ewc)
        grow(model)
        assert ewc().item() == 0.0
        shift(model)
        rows = {"2.weight": model[2].weight[:CLASSES], "2.bias": model[2].bias[:CLASSES]}
        now = {**dict(model.named_parameters()), **rows}
        expected = 0.5 * sum((old[n] * (now[n] - anchor[n]) ** 2).sum() for n in old)
        assert ewc().item() == pytest.approx(expected.item(), rel=1e-5)
        ewc().backward()
        assert model[2].weight.grad[:CLASSES].any()
        assert not model[2].weight.grad[CLASSES:].any()
        torch.testing.assert_close(
            [p.grad for p in model.parameters()],
            list(torch.autograd.grad(expected, list(model.parameters()))),
        )

        task = [(x, y + 2) for x, y in make_task(1)]
        new = explicit_fisher(model, task)
        ewc.consolidate(task)
        assert ewc.fisher["2.weight"].shape == model[2].weight.shape
        torch.testing.assert_close(ewc.fisher["2.weight"][CLASSES:], new["2.weight"][CLASSES:])
        torch.testing.assert_close(
            ewc.fisher["2.weight"][:CLASSES], old["2.weight"] + new["2.weight"][:CLASSES]
        )
        assert torch.equal(ewc.anchor["2.weight"][CLASSES:], model[2].weight[CLASSES:])
        before = ewc().item()
        with torch.no_grad():
            model[2].weight[CLASSES:].add_(1.0)
        assert ewc().item() > before

    def test_row_35_grown_in_place(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        weight, bias = model[2].weight, model[2].bias
        weight.data = torch.cat([weight.detach(), torch.ones(1, 7)])
        bias.data = torch.cat([bias.detach(), torch.ones(1)])
        assert ewc().item() == 0.0
        ewc().backward()
        assert weight.grad.shape == (CLASSES + 1, 7)

    def test_row_35_grown_and_frozen(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        grow(model)
        model[2].requires_grad_(False)
        ewc.consolidate(make_task(1))
        assert ewc.fisher["2.weight"].shape == (CLASSES, 7)
        ewc()

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (
                lambda m: m.__setitem__(2, nn.Linear(7, 2)),
                r"has changed its shape from \(3, 7\) to \(2, 7\)",
            ),
            (
                lambda m: m.__setitem__(2, nn.Linear(8, 3)),
                r"has changed its shape from \(3, 7\) to \(3, 8\)",
            ),
            (lambda m: m.__delitem__(2), "is gone"),
            (lambda m: m.__setitem__(2, nn.Identity()), "is gone"),
            (lambda m: parametrizations.weight_norm(m[2]), "has been parametrized"),
        ],
        ids=["fewer rows", "columns", "deleted", "replaced", "parametrized"],
    )
    @KINDS
    def test_row_36_changed(self, kind, change, what):
        model = make_model()
        ewc = kind(model, Classification())
        ewc.consolidate(make_task())
        fisher, anchor = as_task(ewc)
        change(model)
        for call in (ewc, lambda: ewc.consolidate(make_task()), ewc.state_dict):
            with pytest.raises(ValueError, match=rf"'2\.weight' ({what})") as error:
                call()
            assert same_state(ewc, fisher, anchor)
        released = re.search(r"forget\((.*)\)", str(error.value)).group(1)
        ewc.forget(*re.findall(r"'([^']*)'", released))
        assert list(ewc.fisher)[:2] == ["0.weight", "0.bias"]
        assert ewc().isfinite()

    def test_row_36_broadcastable_shapes_are_no_match(self):
        model = nn.Sequential(nn.Linear(INPUTS, 1), nn.Linear(1, CLASSES))
        ewc = EWC(model, Classification())
        ewc.consolidate(make_task())
        model[1] = nn.Linear(6, CLASSES)
        with pytest.raises(ValueError, match=r"\(3, 1\) to \(3, 6\)"):
            ewc()

    def test_row_36_chosen_name_gone_before_the_first_task(self):
        model, ewc = make_ewc(parameters=["0.weight", "2.weight"])
        model[2] = nn.Identity()
        with pytest.raises(ValueError, match=r"'2\.weight' is gone.*forget\('2\.weight'\)"):
            ewc.consolidate(make_task())
        ewc.forget("2.weight")
        ewc.consolidate([(x, y + 4) for x, y in make_task()])
        assert list(ewc.fisher) == ["0.weight"]

    def test_row_37_module_added(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        model.append(nn.Linear(CLASSES, CLASSES))
        assert ewc().item() == 0.0
        shift(model)
        ewc().backward()
        assert model[3].weight.grad is None
        ewc.consolidate(make_task(1))
        assert list(ewc.fisher) == list(dict(model.named_parameters()))
        before = ewc().item()
        with torch.no_grad():
            model[3].weight.add_(1.0)
        assert ewc().item() > before

    def test_row_37_added_in_front_keeps_the_canonical_order(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, CLASSES)

            def forward(self, x):
                return self.last(self.first(x))

        model = Model()
        model.first.requires_grad_(False)
        ewc = EWC(model, Classification())
        ewc.consolidate(make_task())
        assert list(ewc.fisher) == ["last.weight", "last.bias"]
        model.first.requires_grad_(True)
        ewc.consolidate(make_task())
        assert list(ewc.fisher) == list(dict(model.named_parameters()))


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

    def test_validates_all_names_first(self):
        _, ewc = make_ewc()
        ewc.consolidate(make_task())
        with pytest.raises(ValueError, match=r"'0\.wieght'.*'0\.weight'"):
            ewc.forget("0.bias", "0.wieght")
        assert "0.bias" in ewc.fisher

    @pytest.mark.parametrize("names", [(), (["0.bias"],), (3,)])
    def test_takes_names(self, names):
        with pytest.raises(TypeError, match="forget takes one or more names"):
            make_ewc()[1].forget(*names)


class TestRow42:
    """Constant memory: no tensor is left over."""

    @staticmethod
    def tensors():
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    def test_row_42_many_penalties(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        shift(model)
        ewc().backward()
        model.zero_grad(set_to_none=False)
        before = self.tensors()
        for _ in range(1000):
            model.zero_grad(set_to_none=False)
            ewc().backward()
            ewc()
        assert self.tensors() <= before + 1

    @KINDS
    def test_row_42_many_consolidations(self, kind):
        model = nn.Linear(INPUTS, CLASSES)
        ewc = kind(model, Classification())
        task = make_task(batches=1, size=2)
        for _ in range(3):
            ewc.consolidate(task)
        before = self.tensors()
        for _ in range(1000):
            ewc.consolidate(task)
        assert self.tensors() <= before + 1
        assert ewc.n_tasks == 1003

    def test_row_42_no_cycle_keeps_the_model(self):
        model, ewc = make_ewc()
        ewc.consolidate(make_task())
        ewc().backward()
        gone = weakref.ref(model)
        gc.collect()
        gc.disable()
        try:
            del model, ewc
            assert gone() is None
        finally:
            gc.enable()


def _penalty_in_another_process(ewc, queue):
    queue.put(ewc().item())


@KINDS
class TestRow43:
    @pytest.fixture
    def trained(self, kind):
        model = make_model()
        ewc = kind(model, Classification(), strength=5.0)
        for seed in range(2):
            ewc.consolidate(make_task(seed))
            shift(model, seed)
        return model, ewc

    def test_row_43_deepcopy(self, trained):
        model, ewc = trained
        other = copy.deepcopy(ewc)
        assert torch.equal(other(), ewc())
        expected = ewc().item()
        shift(model, 5)
        assert other().item() == expected
        other.consolidate(make_task(3))
        assert ewc.n_tasks == 2

    def test_row_43_deepcopy_with_its_model(self, trained):
        model, ewc = trained
        together = copy.deepcopy({"ewc": ewc, "model": model})
        shift(together["model"], 5)
        assert together["ewc"]().item() != ewc().item()
        together["ewc"]().backward()
        assert together["model"][0].weight.grad is not None

    def test_row_43_pickle(self, trained):
        _, ewc = trained
        other = pickle.loads(pickle.dumps(ewc))
        assert torch.equal(other(), ewc())
        assert other.n_tasks == ewc.n_tasks

    def test_row_43_process_group(self, trained):
        _, ewc = trained
        ewc._process_group = group = lambda: None  # neither copied nor pickled
        assert copy.deepcopy(ewc)._process_group is group
        assert pickle.loads(pickle.dumps(ewc))._process_group is None
        assert ewc._process_group is group

    def test_row_43_spawn(self, trained):
        _, ewc = trained
        context = mp.get_context("spawn")
        queue = context.Queue()
        with torch.no_grad():
            child = context.Process(target=_penalty_in_another_process, args=(ewc, queue))
            child.start()
        assert queue.get(timeout=120) == ewc().item()
        child.join()


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
        ewc.consolidate([(torch.randn(6, 2), torch.ones(6, 1))])
        assert ewc.fisher["weight"].any()
