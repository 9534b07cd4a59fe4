"""`strength="auto"`: a number from the curvature alone, taken anew when the curvature changes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ewc import EWC, Classification, OnlineEWC, Regression
from ewc._strength import FACTOR
from tests.support.asserts import raises, unchanged
from tests.support.tasks import grow, make, make_model, make_task, same, shift


@pytest.fixture(params=[EWC, OnlineEWC], ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def largest(ewc):
    return max(each.max().item() for each in ewc.fisher.values())


def test_is_the_default(kind):
    model, ewc = make(kind, n_tasks=0)
    assert ewc.strength == 0.0
    summary = ewc.consolidate(make_task())
    assert ewc.strength == pytest.approx(FACTOR / largest(ewc), rel=1e-6)
    assert summary.strength == ewc.strength
    assert summary.automatic
    assert repr(ewc).startswith(f"{kind.__name__}(strength={ewc.strength:g} (auto), ")


def test_is_taken_anew_at_every_consolidation(kind):
    _, ewc = make(kind, n_tasks=1)
    before = ewc.strength
    ewc.consolidate(make_task(3))
    assert ewc.strength == pytest.approx(FACTOR / largest(ewc), rel=1e-6)
    assert ewc.strength < before


def test_a_number_holds_until_auto_is_assigned(kind):
    model, ewc = make(kind, n_tasks=1)
    automatic = ewc.strength
    ewc.strength = 3.0
    summary = ewc.consolidate(make_task(1))
    assert ewc.strength == summary.strength == 3.0
    assert not summary.automatic
    ewc.strength = "auto"
    assert 0 < ewc.strength < automatic
    assert ewc.strength == pytest.approx(FACTOR / largest(ewc), rel=1e-6)


def test_another_word(kind):
    rule = ('strength must be a finite number >= 0, or "auto"; found ', "'automatic'")
    with raises(ValueError, *rule):
        kind(make_model(), Classification(), strength="automatic")
    model, ewc = make(kind)
    with unchanged(ewc, model), raises(ValueError, *rule):
        ewc.strength = "automatic"


def test_undoes_the_scale_of_the_curvature(kind):
    penalties = []
    for weight in (1.0, 1e-6, 1e6):
        model, ewc = make(kind, n_tasks=0)
        ewc.consolidate(make_task(), weight=weight)
        shift(model)
        penalties.append(ewc().item())
    assert penalties[1:] == pytest.approx([penalties[0]] * 2, rel=1e-5)


def test_counts_decay_and_prior():
    prior = {"0.weight": torch.full((7, 5), 9.0)}
    _, ewc = make(OnlineEWC, n_tasks=2, decay=0.5, prior_precision=prior)
    top = max(
        (0.5 * fisher + prior.get(name, torch.zeros(()))).max().item()
        for name, fisher in ewc.fisher.items()
    )
    assert top > 9
    assert ewc.strength == pytest.approx(FACTOR / top, rel=1e-6)


def test_is_that_of_the_state_that_is_loaded(kind):
    _, ewc = make(kind, n_tasks=3)
    state = ewc.state_dict()
    assert "strength" not in state
    other = kind(make_model(5), Classification())
    other.load_state_dict(state)
    assert other.strength == ewc.strength
    fixed = kind(make_model(5), Classification(), strength=2.0)
    fixed.load_state_dict(state)
    assert fixed.strength == 2.0
    fixed.strength = "auto"
    assert fixed.strength == ewc.strength


def test_follows_a_release(kind):
    model, ewc = make(kind, n_tasks=2)
    top = max(ewc.fisher, key=lambda name: ewc.fisher[name].max().item())
    before = ewc.strength
    ewc.forget(top)
    assert ewc.strength == pytest.approx(FACTOR / largest(ewc), rel=1e-6)
    assert ewc.strength > before
    other = kind(make_model(), Classification(), parameters=list(ewc.fisher))
    other.load_state_dict(ewc.state_dict())
    assert other.strength == ewc.strength
    ewc.forget(*ewc.fisher)
    assert ewc.strength == 0.0


def test_follows_a_model_that_grows(kind):
    model, ewc = make(kind)
    before = ewc.strength
    grow(model)
    ewc()
    assert ewc.strength == before


def test_is_copied(kind):
    _, ewc = make(kind, n_tasks=2)
    for other in (copy.deepcopy(ewc), pickle.loads(pickle.dumps(ewc))):
        assert other.strength == ewc.strength
        other.consolidate(make_task(7))
        assert other.strength == pytest.approx(FACTOR / largest(other), rel=1e-6)
        assert other.strength != ewc.strength


def test_a_failed_consolidation_leaves_it(kind):
    model, ewc = make(kind)
    before = ewc.strength

    def batches():
        yield from make_task()
        raise KeyError("stop")

    with unchanged(ewc, model), pytest.raises(KeyError):
        ewc.consolidate(batches())
    assert ewc.strength == before


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_is_stable_below_the_limit_and_not_above(momentum):
    model, ewc = make(EWC)
    limit = 2 * (1 + momentum) / FACTOR
    for share, is_stable in ((0.95, True), (1.05, False)):
        shift(model, 3)
        before = ewc().item()
        optimizer = torch.optim.SGD(model.parameters(), share * limit, momentum=momentum)
        for _ in range(300):
            optimizer.zero_grad()
            ewc().backward()
            optimizer.step()
        assert (ewc().item() < before) == is_stable


@pytest.mark.parametrize("scale", [1e-21, 1e18])
def test_is_finite_however_small_or_large_the_curvature_is(scale):
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    ewc = EWC(model, Regression())
    ewc.consolidate([(torch.full((2, 1), scale), torch.ones(2, 1))])
    assert 0 < ewc.strength <= torch.finfo(torch.float32).max
    with torch.no_grad():
        model.weight.add_(0.1)
    assert ewc().isfinite()


def test_compiled(kind):
    torch._dynamo.reset()
    model, ewc = make(kind)
    compiled = torch.compile(lambda: ewc(), backend="eager", fullgraph=True)
    assert compiled().item() == pytest.approx(ewc().item(), rel=1e-5)
    ewc.consolidate(make_task(1))
    shift(model, 4)
    assert compiled().item() == pytest.approx(ewc().item(), rel=1e-5)
    torch._dynamo.reset()


def test_the_fisher_does_not_depend_on_it(kind):
    _, automatic = make(kind)
    _, fixed = make(kind, strength=1.0)
    assert same(automatic.fisher, fixed.fisher)
