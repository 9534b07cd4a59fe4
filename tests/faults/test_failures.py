"""Rows 15 to 17: a pass that fails, at any point, and a Fisher that is zero."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ewc import EWC, Classification, Custom, Likelihood, ZeroFisherWarning
from ewc.model.guard import Guard
from tests.support.asserts import fails_at, raises, unchanged
from tests.support.tasks import CLASSES, INPUTS, make, make_model, make_task

ERRORS = pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt("stop")])


def with_input(value):
    x, y = make_task(batches=1)[0]
    x[2, 0] = value
    return x, y


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25], ids=str)
@pytest.mark.parametrize("place", [0, 2])
def test_row_15_a_gradient_or_a_square_that_is_not_finite(kind, value, place):
    class Linear(nn.Linear):
        def forward(self, x):
            return super().forward(x.clamp(-1, 1)) + x[:, :1] * self.bias

    batches = make_task(batches=3)
    batches[place] = with_input(value)
    model = Linear(INPUTS, CLASSES)
    ewc = kind(model, Custom(lambda outputs, targets: outputs.sum(1)))
    ewc.consolidate(make_task())
    with (
        unchanged(ewc, model),
        raises(ValueError, "must be finite", f"in batch {place}", "'bias'", "overflows", "scale"),
    ):
        ewc.consolidate(batches)


def test_row_15_the_sum_overflows(kind):
    model, ewc = make(kind, reduction="sum")
    with unchanged(ewc, model), raises(ValueError, "'0.weight'", "overflows", 'reduction="mean"'):
        ewc.consolidate(make_task(), dataset_size=10**60)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")], ids=str)
def test_row_15a_a_parameter_that_is_not_finite(kind, value):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()
            self.mask = nn.Parameter(torch.zeros(CLASSES))

        def forward(self, x):
            return self.body(x) + self.mask.nan_to_num(0.0, 0.0, 0.0)

    model = Masked()
    ewc = kind(model, Classification())
    ewc.consolidate(make_task())
    with torch.no_grad():
        model.mask[0] = value
    with unchanged(ewc, model), raises(ValueError, "must be finite", "'mask'", "requires_grad_"):
        ewc.consolidate(make_task(1))


@pytest.mark.parametrize("n_tasks", [0, 1])
def test_row_15a_after_a_training_that_diverged(kind, n_tasks):
    model, ewc = make(kind, n_tasks=n_tasks)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    x, y = make_task()[0]
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x) ** 3, y).backward()
        optimizer.step()
    assert not model[0].weight.isfinite().all()
    parts = ("Protected parameters must be finite", "'0.weight'", "diverged", "strength * largest")
    with unchanged(ewc, model), raises(ValueError, *parts) as caught:
        ewc.consolidate(make_task(1))
    assert "batch" not in str(caught.value)


@pytest.mark.parametrize("where", ["parameter", "buffer"])
def test_row_15a_in_a_part_that_is_not_protected(kind, where):
    model = nn.Sequential(nn.Linear(INPUTS, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    ewc = kind(model, Classification(), parameters=["2.weight", "2.bias"])
    ewc.consolidate(make_task())
    value = model[0].weight if where == "parameter" else model[1].running_mean
    with torch.no_grad():
        value.fill_(float("nan"))
    name = {"parameter": "'0.weight'", "buffer": "'1.running_mean'"}[where]
    with unchanged(ewc, model), raises(ValueError, "not finite, in " + name, "diverged", "< 2"):
        ewc.consolidate(make_task(1))


class Ignored(nn.Module):
    """A model with two parameters that do not matter."""

    def __init__(self):
        super().__init__()
        self.body = make_model()
        self.unused = nn.Parameter(torch.ones(3))
        self.multiplied = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x):
        return self.body(x) + 0.0 * self.multiplied


class Heads(nn.Module):
    """A head for each task."""

    def __init__(self, heads):
        super().__init__()
        self.heads = nn.ModuleList([make_model() for _ in range(heads)])

    def forward(self, x, task=0):
        return self.heads[task](x)


def test_row_16_one_warning_for_all_heads(kind):
    model = Heads(3)
    ewc = kind(model, Classification())
    with pytest.warns(ZeroFisherWarning) as caught:
        ewc.consolidate(make_task())
    (text,) = [str(one.message) for one in caught]
    names = [name for name, _ in model.named_parameters() if not name.startswith("heads.0.")]
    assert f"{', '.join(map(repr, names))} is zero in every entry: no gradient reached them" in text
    with pytest.warns(ZeroFisherWarning) as caught:  # those of the first head, for the first time
        ewc.consolidate(make_task(), forward=lambda model, batch: model(batch[0], 1))
    (text,) = [str(one.message) for one in caught]
    assert "'heads.0.2.bias' is zero" in text
    assert "heads.1" not in text
    assert "heads.2" not in text
    ewc.consolidate(make_task(), forward=lambda model, batch: model(batch[0], 2))


def test_row_16_one_warning_per_name_ever(kind):
    ewc = kind(Ignored(), Classification())
    with pytest.warns(ZeroFisherWarning) as caught:
        ewc.consolidate(make_task())
    (text,) = [str(one.message) for one in caught]
    assert "'unused' is zero in every entry: no gradient reached it" in text
    assert "'multiplied' is zero in every entry: every gradient that reached it is" in text
    assert "does not protect them" in text
    assert caught[0].filename == __file__
    ewc.consolidate(make_task())
    copy.deepcopy(ewc).consolidate(make_task())
    ewc.load_state_dict(ewc.state_dict())
    ewc.consolidate(make_task())
    assert not ewc.fisher["unused"].any()


@pytest.mark.parametrize(
    "nll",
    [lambda y, t: 0.0 * y.sum(1), lambda y, t: y.sum(1).clamp(1e9, 2e9)],
    ids=["times zero", "saturated"],
)
def test_row_16_all_zero(kind, nll):
    for n_tasks in (0, 1):
        model, ewc = make(kind, n_tasks=n_tasks)
        with (
            unchanged(ewc, model),
            raises(
                ValueError,
                "Fisher of every parameter is zero",
                "fits these data perfectly",
                'fisher_type="exact"',
                "compares the samples",
                "detached",
                "masked",
            ),
        ):
            ewc.consolidate(make_task(), likelihood=Custom(nll))


def test_row_16_all_positions_ignored(kind):
    model, ewc = make(kind)
    task = [(x, torch.full_like(y, -100)) for x, y in make_task()]
    with unchanged(ewc, model), raises(ValueError, "Fisher of every parameter is zero", "ignored"):
        ewc.consolidate(task)


def test_row_16_other_parameters_are_used(kind):
    model = Ignored()
    ewc = kind(model, Classification(), parameters=["unused"])
    with (
        unchanged(ewc, model),
        raises(ValueError, "Fisher of every", "the outputs use other parameters only"),
    ):
        ewc.consolidate(make_task())


class Fragile(nn.Module):
    """Calls `tick` whenever it is run, forward or backward."""

    def __init__(self, tick, backward=False):
        super().__init__()
        self.body = make_model()
        self.register_buffer("runs", torch.zeros(()))
        self.tick, self.backward = [tick], backward

    def forward(self, x):
        self.runs += 1
        outputs = self.body(x)
        if not self.backward:
            self.tick[0]()
        elif outputs.requires_grad:
            outputs = Ticking.apply(outputs, self.tick[0])
        return outputs


class Ticking(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, tick):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.tick = inputs[1]

    @staticmethod
    def backward(ctx, g):
        ctx.tick()
        return g, None


class Softmax(Likelihood):
    """Calls `tick` whenever it is evaluated."""

    def __init__(self, tick):
        self.tick = tick

    def nll(self, outputs, targets):
        self.tick()
        return Classification().nll(outputs, targets)


def nothing():
    pass


def prepared(kind, place):
    """An object in use, and a function that consolidates with something that ticks at `place`."""
    model = Fragile(nothing, backward=place == "backward")
    ewc = kind(model, Classification())
    ewc.consolidate(make_task())
    model.body[0].eval()
    model.body[0].weight.grad = torch.randn(7, INPUTS)
    task = make_task(1, batches=3)

    def consolidate(tick):
        def loader():
            torch.rand(1), random.random(), np.random.rand()  # a loader that shuffles
            for batch in task:
                tick()
                yield batch

        model.tick[0] = tick if place in ("forward", "backward") else nothing
        try:
            ewc.consolidate(
                loader() if place == "loader" else task,
                likelihood=Softmax(tick) if place == "likelihood" else None,
            )
        finally:
            model.tick[0] = nothing

    return model, ewc, consolidate


@ERRORS
@pytest.mark.parametrize("place", ["loader", "forward", "likelihood", "backward"])
def test_row_17_an_error_in_the_middle_is_raised_again(kind, place, error):
    calls = []
    prepared(kind, place)[2](lambda: calls.append(None))
    model, ewc, consolidate = prepared(kind, place)
    for call in range(1, len(calls) + 1):
        with unchanged(ewc, model), raises(type(error), "stop") as caught:
            consolidate(fails_at(call, error))
        assert caught.value is error
    consolidate(fails_at(len(calls) + 1, error))
    assert ewc.n_tasks == 2


@pytest.mark.parametrize("place", ["forward", "likelihood", "backward"])
def test_row_17_a_stop_iteration_ends_no_loop_of_ours(kind, place):
    # In a loader it is no error: it says that there are no more batches.
    calls = []
    prepared(kind, place)[2](lambda: calls.append(None))
    model, ewc, consolidate = prepared(kind, place)
    for call in range(1, len(calls) + 1):
        with unchanged(ewc, model), raises(StopIteration, "stop"):
            consolidate(fails_at(call, StopIteration("stop")))


@ERRORS
@pytest.mark.parametrize(
    "step",
    [
        "_consolidation.collect",
        "quadratic.merging.snapshot",
        "quadratic.merging.in_order",
        "_consolidation.State",
        "_consolidation.Binding",
        "_consolidation.measure",
    ],
)
def test_row_17a_an_error_while_committing(kind, monkeypatch, error, step):
    model, ewc = make(kind)
    expected = ewc().item()

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch, unchanged(ewc, model), raises(type(error), "stop"):
        patch.setattr(f"ewc.{step}", fail)
        ewc.consolidate(make_task(1))
    assert ewc().item() == expected


def test_row_17b_a_warning_turned_error(kind):
    model = Ignored()
    ewc = kind(model, Classification())
    for _ in range(2):
        with unchanged(ewc, model), pytest.raises(ZeroFisherWarning):
            ewc.consolidate(make_task())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ewc.consolidate(make_task())
    assert ewc.n_tasks == 1


def test_row_17_no_memory_for_the_copies_of_buffers(kind, monkeypatch):
    model = nn.Sequential(nn.Linear(INPUTS, CLASSES), nn.BatchNorm1d(CLASSES))
    ewc: EWC = kind(model, Classification())

    def clone(tensor, **options):
        raise torch.OutOfMemoryError("stop")

    with (
        unchanged(ewc, model),
        monkeypatch.context() as patch,
        raises(torch.OutOfMemoryError, "stop"),
    ):
        patch.setattr(torch.Tensor, "clone", clone)
        ewc.consolidate(make_task())


@pytest.mark.parametrize("own", [True, False])
def test_row_17c_a_failure_after_the_pass_takes_back_what_was_drawn(kind, own):
    model, ewc = make(kind, fisher_type="mc")
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([1e4, 0.0, 0.0]))  # the outcome of a draw is certain
    generator = torch.Generator().manual_seed(0) if own else None
    before = None if generator is None else generator.get_state()
    with unchanged(ewc, model), raises(ValueError, "every parameter is zero"):
        ewc.consolidate(make_task(), generator=generator)
    if generator is not None:
        assert torch.equal(generator.get_state(), before)


def test_row_17d_interrupted_while_the_model_is_prepared(kind, monkeypatch):
    model, ewc = make(kind)
    model[2].eval()
    model[2].weight.grad = torch.ones_like(model[2].weight)
    model[0].weight.register_hook(lambda gradient: gradient)
    prepare = Guard.prepare

    def interrupted(self):
        prepare(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Guard, "prepare", interrupted)
    with unchanged(ewc, model), pytest.raises(KeyboardInterrupt):
        ewc.consolidate(make_task())


@pytest.mark.parametrize("method", ["restore", "leave"])
def test_row_17e_interrupted_while_the_model_is_put_back(kind, monkeypatch, method):
    model, ewc = make(kind)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    restore, calls = getattr(Guard, method), []

    def interrupted(self):
        calls.append(self)
        if len(calls) == last:
            raise KeyboardInterrupt
        restore(self)

    monkeypatch.setattr(Guard, method, interrupted)
    last = 0
    ewc.consolidate(make_task())
    last = len(calls)  # the one at the very end
    calls.clear()
    with unchanged(ewc, model), pytest.raises(KeyboardInterrupt):
        ewc.consolidate(make_task())
