"""Rows 38, 40 and 41: what the fast paths cannot do is exact all the same, and is reported."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ewc import Classification, SlowPathWarning
from tests import architectures, oracle
from tests.architectures import Checkpointed
from tests.support.asserts import assert_close, raises, unchanged
from tests.support.tasks import CLASSES, INPUTS, make, make_model, make_task, shift

SLOW = pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning")


def test_row_38_sparse_embedding(kind):
    def consolidated(sparse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))
        ewc = kind(model, Classification())
        ewc.consolidate([(torch.tensor([[0, 1], [1, 1], [4, 2]]), torch.tensor([0, 1, 2]))])
        shift(model)
        return model, ewc

    (dense_model, dense), (sparse_model, sparse) = consolidated(False), consolidated(True)
    assert_close(sparse.fisher, dense.fisher)
    assert sparse().item() == pytest.approx(dense().item())
    x, y = torch.tensor([[0, 1]]), torch.tensor([2])
    for model, ewc in ((dense_model, dense), (sparse_model, sparse)):
        (F.cross_entropy(model(x), y) + ewc()).backward()
    torch.testing.assert_close(sparse_model[0].weight.grad.to_dense(), dense_model[0].weight.grad)


def test_row_38_complex_parameter(kind):
    class Wave(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(INPUTS, CLASSES, dtype=torch.cfloat, generator=generator)
            self.weight = nn.Parameter(weight)

        def forward(self, x):
            outputs = x.to(torch.cfloat) @ self.weight
            return outputs.real + outputs.imag**2

    model = Wave()
    ewc = kind(model, Classification())
    ewc.consolidate(make_task())
    fisher, anchor = ewc.fisher["weight"], ewc.anchor["weight"]
    assert fisher.dtype is torch.float32
    assert (fisher >= 0).all()
    assert fisher.any()
    with torch.no_grad():
        model.weight.add_(0.1 + 0.2j)
    expected = 0.5 * ewc.strength * (fisher * (model.weight - anchor).abs() ** 2).sum()
    assert ewc().item() == pytest.approx(expected.item())
    torch.testing.assert_close(
        torch.autograd.grad(ewc(), model.weight), torch.autograd.grad(expected, model.weight)
    )


def checkpointed(use_reentrant, differentiable):
    torch.manual_seed(0)
    return Checkpointed(use_reentrant, width=INPUTS, differentiable=differentiable)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_row_40_checkpointing_is_exact(kind, use_reentrant, differentiable):
    model = checkpointed(use_reentrant, differentiable)
    _, ewc = make(kind, model, n_tasks=0)
    with unchanged(None, model):
        summary = ewc.consolidate(make_task())
    assert_close(ewc.fisher, oracle.fisher(checkpointed(False, differentiable), make_task()))
    assert ewc.fisher["block.0.weight"].any()
    assert set(summary.paths.values()) == {"rule"}


class OwnCheckpoint(torch.autograd.Function):
    """Another library's reentrant checkpoint."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.backward(y, g)
        return x.grad, None


def test_row_40_reentrant_checkpointing_of_others_is_refused(kind):
    class CheckpointFunction(OwnCheckpoint):
        pass

    class Theirs(Checkpointed):
        def forward(self, x):
            return self.read(CheckpointFunction.apply(x.clone().requires_grad_(), self.block))

    model = Theirs(width=INPUTS)
    ewc = kind(model, Classification())
    parts = ("reentrant activation checkpointing", "would be zero", "use_reentrant=False")
    with unchanged(ewc, model), raises(ValueError, *parts):
        ewc.consolidate(make_task())


class NoVmap(torch.autograd.Function):
    """A function of the user's that has no rule for vmap."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w * w, (2 * g * x * w).sum(0)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.rand(INPUTS) + 0.5)
        self.head = nn.Linear(INPUTS, CLASSES)

    def forward(self, x):
        return self.head(NoVmap.apply(x, self.w).tanh())


def test_row_41_a_layer_that_vmap_cannot_do(kind):
    model = Own()
    _, ewc = make(kind, model, n_tasks=0)
    summary = ewc.consolidate(make_task())
    assert_close(ewc.fisher, oracle.fisher(model, make_task()))
    assert summary.paths == {"w": "vmap", "head.weight": "rule", "head.bias": "rule"}
    assert not summary.reasons


class Force(Own):
    """Differentiates inside its forward."""

    def forward(self, x):
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad((x * self.w).tanh().sum(), x, create_graph=True)
        return self.head(force)


@SLOW
def test_row_41_a_model_that_vmap_cannot_do(kind):
    model = Force()
    _, ewc = make(kind, model, n_tasks=0)
    summary = ewc.consolidate(make_task())
    assert_close(ewc.fisher, oracle.fisher(model, make_task()))
    assert set(summary.paths.values()) == {"loop"}
    assert set(summary.reasons) == set(summary.paths)
    assert "differentiates by autograd" in summary.reasons["w"]
    *_, last = repr(summary).splitlines()
    assert last.startswith(
        "  loop: w, head.weight, head.bias, because vmap cannot do it (RuntimeError: "
    )


@pytest.mark.parametrize("name", ["moves the batch axis", "own function", "direct", "products"])
def test_row_41_awkward_models(kind, name):
    case = architectures.CASES[name]
    model, inputs, targets = architectures.build(case, 4, torch.float32)
    ewc = kind(model, Classification())
    summary = ewc.consolidate([(inputs, targets)])
    assert_close(ewc.fisher, oracle.fisher(model.eval(), [(inputs, targets)]))
    assert set(summary.paths.values()) <= {"rule", "vmap", "loop"}


def test_row_41_a_batch_of_objects(kind):
    """One object per sample, which only a forward can read."""

    def forward(model, batch):
        texts, _ = batch
        return model(torch.stack([torch.full((INPUTS,), float(len(text))) for text in texts]))

    model = make_model()
    ewc = kind(model, Classification(), forward=forward)
    texts, targets = ["a", "bb", "cccc"], torch.tensor([0, 1, 2])
    summary = ewc.consolidate([(texts, targets)])
    lengths = torch.tensor([[1.0], [2.0], [4.0]]).expand(3, INPUTS)
    assert_close(ewc.fisher, oracle.fisher(model, [(lengths, targets)]))
    assert "lists of objects" in summary.reasons["0.weight"]


def test_row_41b_the_slow_path_is_said_once(kind):
    model = Force()
    ewc = kind(model, Classification())
    task = make_task(size=6)
    with pytest.warns(SlowPathWarning) as caught:
        ewc.consolidate(task)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    for part in ("one at a time", "same Fisher", "'w', 'head.weight', 'head.bias'", "because"):
        assert part in message
    assert "differentiates by autograd" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ewc.consolidate(task)
        copy.deepcopy(ewc).consolidate(task)
        ewc.load_state_dict(ewc.state_dict())
        ewc.consolidate(task)
        make(kind, Force())[1].consolidate(make_task(size=3))  # costs no more than a few times


@SLOW
@pytest.mark.filterwarnings("ignore:`torch.jit.")  # its category depends on the version
@pytest.mark.parametrize("how", ["module", "in place", "scripted", "all scripted"])
def test_row_41c_compiled_and_scripted_parts(kind, how):
    model = make_model()
    expected = oracle.fisher(model, make_task())
    if how == "module":
        model[0] = torch.compile(model[0], backend="aot_eager")
    elif how == "in place":
        model[0].compile(backend="aot_eager")
        model.compile(backend="aot_eager")
    elif how == "scripted":
        model[0] = torch.jit.script(model[0])
    else:
        model = torch.jit.script(model)
    model(make_task()[0][0])
    _, ewc = make(kind, model, n_tasks=0)
    summary = ewc.consolidate(make_task())
    assert_close(ewc.fisher, expected)
    if "scripted" not in how:
        assert set(summary.paths.values()) == {"rule"}
    shift(model)
    assert ewc().item() > 0.0
    torch._dynamo.reset()


class Centred(nn.Module):
    """Takes the mean of its batch away."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class Written(nn.BatchNorm1d):
    """Normalises by the batch in eval mode too, and writes its statistics, unseen by versions."""

    def forward(self, x):
        pair = torch.stack([x, 2 * x], -1)
        statistics = self.running_mean, self.running_var
        return nn.functional.batch_norm(pair, *statistics, training=True)[..., 0]


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (Written(7), "(Written) mixes them: the output for a sample"),
        (nn.BatchNorm1d(7, track_running_stats=False), "(BatchNorm1d) mixes them: it has no run"),
        (Centred(), "(Centred) mixes them: the output for a sample"),
    ],
)
def test_row_41a_a_module_that_mixes_samples(kind, module, what):
    model = make_model()
    ewc = kind(model, Classification())
    ewc.consolidate(make_task())
    model[1] = module
    rule = "treat the samples of a batch independently"
    parts = (rule, "module '1'", what, "GroupNorm, LayerNorm")
    with unchanged(ewc, model), raises(ValueError, *parts):
        ewc.consolidate(make_task())
