"""Rows 18 to 23: what a consolidation must not change, and must not depend on."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ewc import Classification, Custom
from tests import oracle
from tests.support.asserts import assert_close, raises, unchanged
from tests.support.tasks import CLASSES, INPUTS, make, make_model, make_task, same


def consolidated(kind, model):
    """An object that has consolidated; the model and the process are unchanged."""
    ewc = kind(model, Classification())
    with unchanged(None, model):
        ewc.consolidate(make_task())
    return ewc


class Norms(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Linear(INPUTS, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, CLASSES)
        )
        nn.init.uniform_(self[1].running_mean)


def test_row_18_flags_of_submodules(kind):
    model = Norms()
    model[0].eval()
    model[2].eval()
    consolidated(kind, model)
    assert [module.training for module in model.modules()] == [True, False, True, False, True]


def test_row_18_a_module_that_overrides_train(kind):
    class Merging(nn.Linear):
        """Merges an update into its weight whenever it is put into eval mode."""

        def train(self, mode=True):
            if not mode:
                self.weight.data += 1.0
            return super().train(mode)

    consolidated(kind, nn.Sequential(Merging(INPUTS, CLASSES)))


def test_row_19_gradients(kind):
    model = make_model()
    model[0].weight.grad = torch.randn(7, INPUTS)
    model[2].bias.grad = torch.full((CLASSES,), float("nan"))
    consolidated(kind, model)
    assert model[0].bias.grad is None
    assert model[2].weight.grad is None


@pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning")
def test_row_19_a_model_that_runs_backward(kind):
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model()

        def forward(self, x):
            self.inner(x).sum().backward()
            return self.inner(x)

    model = Greedy()
    model.inner[0].weight.grad = torch.randn(7, INPUTS)
    model.inner[2].bias.grad = torch.full((CLASSES,), float("nan"))
    ewc = consolidated(kind, model)
    assert_close(
        ewc.fisher,
        {f"inner.{name}": f for name, f in oracle.fisher(make_model(), make_task()).items()},
    )


def test_row_20_a_step_fused_into_backward(kind):
    model = make_model()
    steps = []

    def step(parameter):
        steps.append(parameter)
        with torch.no_grad():
            parameter.add_(1.0)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    ewc = consolidated(kind, model)
    assert not steps
    assert same(ewc.anchor, dict(model.state_dict()))


def test_row_20a_hooks_on_gradients(kind):
    """Hooks belong to training: the Fisher is that of gradients that are not clipped."""
    model = make_model()
    expected = oracle.fisher(model, make_task())
    seen = []

    def clip(gradient):
        seen.append(gradient)
        return gradient * 1e-3

    for parameter in model.parameters():
        parameter.register_hook(clip)
    ewc = consolidated(kind, model)
    assert not seen
    assert_close(ewc.fisher, expected)


def test_row_21_batch_norm_and_dropout_in_train_mode(kind):
    model = Norms()
    expected = oracle.fisher(model.eval(), make_task())
    ewc = consolidated(kind, model.train())
    assert_close(ewc.fisher, expected)


def test_row_21a_a_loader_that_runs_the_model(kind):
    model = Norms().eval()
    task = [(x, model(x).argmax(1)) for x, _ in make_task(batches=3)]
    expected = oracle.fisher(model, task)

    def pseudo_labels():
        for x, _ in task:
            model.eval()
            y = model(x).argmax(1)
            model.train()
            model(x)  # a step of something else
            yield x, y

    model.train()
    ewc = kind(model, Classification())
    with unchanged(None, model):
        draws = torch.get_rng_state()
        ewc.consolidate(pseudo_labels())
        torch.set_rng_state(draws)  # those of the loader's dropout
    assert_close(ewc.fisher, expected)


@pytest.mark.parametrize(
    "buffer",
    [
        torch.eye(3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.tensor(float("nan")),
        torch.zeros(1).expand(3),
    ],
    ids=["sparse", "meta", "nan", "expanded"],
)
def test_row_21_buffers_of_any_kind(kind, buffer):
    model = make_model()
    expected = oracle.fisher(model, make_task())
    before = buffer.clone()
    model.register_buffer("extra", buffer)
    ewc = kind(model, Classification())
    ewc.consolidate(make_task())
    assert model.extra is buffer
    torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)
    assert_close(ewc.fisher, expected)


def test_row_21_buffers_that_a_forward_writes(kind):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(INPUTS, CLASSES)
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(INPUTS))
            self.calls = 0

        def forward(self, x):
            self.count += 1
            self.mean = self.mean + x.detach().mean(0)
            self.calls += 1
            return self.layer(x)

    model = Counting()
    consolidated(kind, model)
    assert model.calls == 0


class Encoder(nn.Sequential):
    """Another network, in train mode: its dropout draws, and its norm mixes samples."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__(nn.Linear(INPUTS, INPUTS), nn.Dropout(0.5), nn.BatchNorm1d(INPUTS))
        nn.init.uniform_(self[2].running_mean)


ENCODER = Encoder()


def by_name(model, batch):
    return model(ENCODER(batch[0]))


class Student(nn.Module):
    """Hides its teacher from `modules()`."""

    def __init__(self, teacher):
        super().__init__()
        self.hidden, self.layers = [teacher], make_model()

    def forward(self, x):
        return self.layers(self.hidden[0](x))


@pytest.mark.parametrize("how", ["closure", "name", "likelihood", "hidden"])
def test_row_21b_another_network(kind, how):
    other = ENCODER if how == "name" else Encoder()
    model, forward, likelihood = make_model(), None, Classification()
    expected_model = nn.Sequential(copy.deepcopy(other).eval(), make_model())
    expected = oracle.fisher(expected_model, make_task(), ["1.0.weight"])["1.0.weight"]
    name = "0.weight"
    if how == "closure":
        forward = lambda model, batch: model(other(batch[0]))  # noqa: E731
    elif how == "name":
        forward = by_name
    elif how == "hidden":
        model, name = Student(other), "layers.0.weight"
    else:

        def nll(outputs, targets):
            with torch.no_grad():
                other(torch.ones(len(targets), INPUTS))
            return oracle.nll(outputs, targets)

        likelihood, expected = Custom(nll), oracle.fisher(model, make_task())[name]
    ewc = kind(model, likelihood, forward=forward)
    with unchanged(None, model), unchanged(None, other):
        summary = ewc.consolidate(make_task())
    assert set(summary.paths.values()) == {"rule"}
    assert_close({name: ewc.fisher[name]}, {name: expected})
    assert other.training


def test_row_21b_a_message_about_mixing_names_it(kind):
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True)

    other = nn.Sequential(nn.Linear(INPUTS, INPUTS), Centred())
    model = make_model()
    ewc = kind(model, Classification(), forward=lambda model, batch: model(other(batch[0])))
    with (
        unchanged(ewc, model),
        raises(ValueError, "a module outside the model (Centred, '1') mixes them"),
    ):
        ewc.consolidate(make_task())


class Keeping(nn.Module):
    """Keeps what it makes of a parameter, and notes how often it ran."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.bias = make_model(), nn.Parameter(torch.randn(CLASSES))
        self.cache, self.notes = {}, {"runs": [0, {"shapes": set()}]}

    def forward(self, x):
        self.notes["runs"][0] += 1
        self.notes["runs"][1]["shapes"].add(tuple(x.shape))
        if self.training:
            return self.layers(x) + self.bias.exp()
        if x.device not in self.cache:
            self.cache[x.device] = self.bias.exp()
        return self.layers(x) + self.cache[x.device]


def test_row_21c_containers_in_attributes(kind):
    model = Keeping()
    notes = model.notes["runs"]
    ewc = kind(model, Classification())
    ewc.consolidate(make_task())
    assert model.notes["runs"] is notes
    assert notes == [0, {"shapes": set()}]
    assert model.cache == {}


@pytest.mark.parametrize("grad", [False, True])
def test_row_21d_a_cache_that_an_evaluation_has_filled(kind, grad):
    model = Keeping().eval()
    with torch.set_grad_enabled(grad):
        outputs = model(make_task()[0][0])
    if grad:
        outputs.sum().backward()
    cached = dict(model.cache)
    ewc = kind(model, Classification())
    with unchanged(None, model):
        ewc.consolidate(make_task())
    assert list(model.cache.values()) == list(cached.values())
    plain = Keeping().train()  # in which nothing is kept
    samples = [(x[n : n + 1], y[n : n + 1]) for x, y in make_task() for n in range(len(y))]
    total = 0.0
    for x, y in samples:
        (gradient,) = torch.autograd.grad(oracle.nll(plain(x), y), plain.bias)
        total = total + gradient**2 / len(samples)
    assert_close({"bias": ewc.fisher["bias"]}, {"bias": total})


@pytest.mark.parametrize("source", ["global", "generator"])
def test_row_22_the_same_seed(kind, source):
    def fisher(seed):
        model, ewc = make(kind, n_tasks=0, fisher_type="mc")
        generator = torch.Generator().manual_seed(seed) if source == "generator" else None
        torch.manual_seed(seed)
        with nullcontext() if generator is None else unchanged(None, model):
            ewc.consolidate(make_task(), generator=generator)
        return ewc.fisher

    assert same(fisher(3), fisher(3))
    assert not same(fisher(3), fisher(4))


def test_row_22_the_random_state_does_not_move_without_draws(kind):
    for fisher_type in ("empirical", "exact"):
        model, ewc = make(kind, n_tasks=0, fisher_type=fisher_type)
        with unchanged(None, model):
            ewc.consolidate(make_task())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_row_23_consolidated_inside(kind, mode):
    model = make_model()
    expected = oracle.fisher(model, make_task())
    ewc, other = kind(model, Classification()), kind(model, Classification())
    with mode():
        ewc.consolidate([(x.clone(), y.clone()) for x, y in make_task()])
        state = ewc.state_dict()
    assert_close(ewc.fisher, expected)
    # What was made inside must work in autograd outside.
    ewc().backward()
    other.load_state_dict(state)
    other().backward()


def test_row_23_called_inside(kind):
    model, ewc = make(kind)
    expected = ewc().item()
    for mode in (torch.no_grad, torch.inference_mode):
        ewc = pickle.loads(pickle.dumps(ewc))  # what the first call caches is made inside
        with mode():
            penalty = ewc()
        assert penalty.item() == expected
        assert not penalty.requires_grad
        model.zero_grad()
        ewc().backward()


def test_row_23_a_model_made_in_inference_mode(kind):
    with torch.inference_mode():
        model = make_model()
    ewc = kind(model, Classification())
    with unchanged(ewc, model), pytest.raises(RuntimeError, match="Inference tensors cannot be"):
        ewc.consolidate(make_task())


def test_row_23_what_a_model_keeps_of_an_evaluation_in_inference_mode(kind):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.features = make_model(), None
            self.register_buffer("last", torch.zeros(CLASSES))

        def forward(self, x):
            outputs = self.inner(x)
            self.features, self.last = [outputs], outputs[-1].detach()
            return outputs

    model = Keeping()
    with torch.inference_mode():
        model(make_task()[0][0])
    ewc = kind(model, Classification())
    with unchanged(None, model):
        ewc.consolidate(make_task())
    expected = oracle.fisher(model.inner, make_task())
    assert_close(ewc.fisher, {f"inner.{name}": each for name, each in expected.items()})
