"""Rows 1 to 5: an invalid argument is an error at once, not when it is first used."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ewc import Classification, Custom, NothingProtectedWarning, OnlineEWC, Regression
from tests.support.asserts import raises, unchanged
from tests.support.tasks import make, make_model, make_task, shift

HUGE = pytest.param(10**400, id="10**400")
NUMBERS = [-1.0, float("nan"), float("inf"), -float("inf"), True, "1", None, 1j, [1.0], HUGE]


@pytest.mark.parametrize("wrong", NUMBERS, ids=repr)
def test_row_01_strength(kind, wrong):
    rule = ('strength must be a finite number >= 0, or "auto"; found ', repr(wrong))
    with raises((TypeError, ValueError), *rule):
        kind(make_model(), Classification(), strength=wrong)
    model, ewc = make(kind, strength=2.0)
    expected = ewc().item()
    with unchanged(ewc, model), raises((TypeError, ValueError), *rule):
        ewc.strength = wrong
    assert ewc().item() == expected


@pytest.mark.parametrize("wrong", [*NUMBERS, -0.1, 1.1], ids=repr)
def test_row_01_decay(wrong):
    with raises((TypeError, ValueError), "decay must be in [0, 1]; found ", repr(wrong)):
        OnlineEWC(make_model(), Classification(), decay=wrong)


@pytest.mark.parametrize("wrong", NUMBERS, ids=repr)
def test_row_01_prior(wrong):
    rule = ("prior_precision must be a finite number >= 0; found ", repr(wrong))
    with raises((TypeError, ValueError), *rule):
        OnlineEWC(make_model(), Classification(), prior_precision=wrong)


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ({"0.wieght": torch.ones(7, 5)}, ["'0.wieght' (nearest: '0.weight'"]),
        ({"0.weight": 1.0}, ["'0.weight' has a float for a tensor"]),
        ({"0.weight": torch.tensor(1.0)}, ["shape (), the parameter (7, 5)", "broadcast"]),
        ({"0.weight": torch.ones(1, 5)}, ["shape (1, 5), the parameter (7, 5)"]),
        ({"0.bias": -torch.ones(7)}, ["'0.bias' has negative"]),
        ({"0.bias": torch.full((7,), float("nan"))}, ["NaN"]),
        ({"0.bias": torch.full((7,), float("inf"))}, ["infinite"]),
        ({"0.bias": torch.ones(7, dtype=torch.cfloat)}, ["complex64"]),
        ({"0.bias": torch.ones(7, dtype=torch.bool)}, ["torch.bool"]),
        ({3: torch.ones(7)}, ["no parameter is named 3"]),
        ({"0.bias": torch.ones(7, device="meta")}, ["'0.bias'", "on the meta device"]),
        ({"0.bias": torch.ones(7).to_sparse()}, ["'0.bias' has a tensor that is not dense"]),
        ({"0.bias": torch.zeros(()).expand(10**13)}, ["shape (10000000000000,)"]),
        ({"0.bias": 1.0, "x": torch.ones(7)}, ["'0.bias' has a float", "named 'x'"]),
    ],
)
def test_row_01_prior_by_name(wrong, parts):
    with raises(ValueError, "prior_precision must be a number >= 0 or {name: tensor}", *parts):
        OnlineEWC(make_model(), Classification(), prior_precision=wrong)


@pytest.mark.parametrize("wrong", [0.0, *NUMBERS, torch.tensor([1.0, 0.0])], ids=repr)
def test_row_01_variance(kind, wrong):
    with raises((TypeError, ValueError), "variance must be finite and > 0"):
        kind(make_model(), Regression(variance=wrong))


@pytest.mark.parametrize("wrong", [0, 0.0, *NUMBERS, 10**400, torch.tensor(1.0)], ids=repr)
def test_row_01_weight(kind, wrong):
    model, ewc = make(kind)
    rule = ("weight must be a finite number > 0; found ",)
    with unchanged(ewc, model), raises((TypeError, ValueError), *rule):
        ewc.consolidate(make_task(1), weight=wrong)


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ("fisher_type", "fisher_type must be one of 'empirical', 'exact', 'mc'; found"),
        ("reduction", "reduction must be one of 'mean', 'sum'; found"),
        ("max_samples", "max_samples must be a positive integer; found"),
        ("forward", "forward must be a function forward(model, batch) -> outputs; found"),
        ("parameters", "parameters must be None or an iterable of names"),
    ],
)
@pytest.mark.parametrize("wrong", ["other", 3.5, True, 0, -1])
def test_row_01a_options(kind, option, rule, wrong):
    with raises((TypeError, ValueError), rule):
        kind(make_model(), Classification(), **{option: wrong})


def test_row_01a_model_and_likelihood(kind):
    with raises(TypeError, "model must be an nn.Module; found function"):
        kind(lambda x: x, Classification())
    with raises(TypeError, "likelihood must be a Likelihood", "use Custom(nll)"):
        kind(make_model(), F.cross_entropy)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"batches": 3}, "batches must be an iterable of batches, such as a DataLoader; found int"),
        ({"generator": 0}, "generator must be a torch.Generator; found int"),
        ({"likelihood": "softmax"}, "likelihood must be a Likelihood"),
        ({"forward": "model"}, "forward must be a function"),
        *(({"dataset_size": n}, "dataset_size must be a positive") for n in (0, -1, True, "3")),
    ],
)
def test_row_01a_options_of_consolidate(kind, options, rule):
    model, ewc = make(kind, reduction="sum")
    options = {"batches": make_task(), **options}
    with unchanged(ewc, model), raises((TypeError, ValueError), rule):
        ewc.consolidate(**options)


@pytest.mark.parametrize(("fisher_type", "define"), [("exact", "exact_terms"), ("mc", "sample")])
def test_row_01b_a_likelihood_that_lacks_a_method(kind, fisher_type, define):
    likelihood = Custom(lambda outputs, targets: outputs.sum(1))
    parts = (f"{define}(outputs", "Custom must define", 'choose fisher_type="empirical"')
    with raises(ValueError, *parts):
        kind(make_model(), likelihood, fisher_type=fisher_type)
    model, ewc = make(kind, fisher_type=fisher_type)
    with unchanged(ewc, model), raises(ValueError, *parts):
        ewc.consolidate(make_task(), likelihood=likelihood)


def test_row_01c_no_decay_and_no_prior():
    with pytest.warns(NothingProtectedWarning, match="penalty 0.*Fix: pass a decay") as caught:
        OnlineEWC(make_model(), Classification(), decay=0)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    OnlineEWC(make_model(), Classification(), decay=0.0, prior_precision=1.0)
    prior = {"0.bias": torch.ones(7)}
    OnlineEWC(make_model(), Classification(), decay=0.0, prior_precision=prior)


@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_row_02_strength_zero(kind, scale):
    model, ewc = make(kind, strength=0.0)
    shift(model, by=scale)  # far enough for the squares, and their gradients, to overflow
    penalty = ewc()
    assert penalty.item() == 0.0
    penalty.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "options", "among"),
    [
        (nn.ReLU(), {}, "those of the model"),
        (nn.Linear(2, 2).requires_grad_(False), {}, "those of the model"),
        (make_model(), {"parameters": []}, "the names given"),
    ],
    ids=["none", "all frozen", "no names"],
)
def test_row_03_nothing_to_protect(kind, model, options, among):
    with raises(ValueError, "must be a parameter to protect", "none with requires_grad", among):
        kind(model, Classification(), **options)


def test_row_03_all_frozen_later(kind):
    model, ewc = make(kind)
    model.requires_grad_(False)
    with unchanged(ewc, model), raises(ValueError, "must be a parameter to protect"):
        ewc.consolidate(make_task())


def test_row_04_unknown_names_all_at_once(kind):
    model = make_model()
    with (
        unchanged(None, model),
        raises(ValueError, "'2.wight' (nearest: '2.weight'", "'0.bais' (nearest: '0.bias'"),
    ):
        kind(model, Classification(), parameters=["2.wight", "0.weight", "0.bais"])


def test_row_04a_parameters_of_another_model_or_frozen(kind):
    model = make_model()
    model[0].bias.requires_grad_(False)
    stranger = nn.Parameter(torch.zeros(3))
    wrong = ["0.bias", ("mine", stranger), ("0.weight", model[2].weight)]
    with (
        unchanged(None, model),
        raises(ValueError, "'0.bias' is frozen", "'mine' is paired with", "named '2.weight'"),
    ):
        kind(model, Classification(), parameters=wrong)
    with raises(TypeError, "a name or a (name, parameter) pair", "model.named_parameters()"):
        kind(model, Classification(), parameters=model.parameters())
    with raises(TypeError, "iterable of names", "found '0.weight'", "a list of one name"):
        kind(model, Classification(), parameters="0.weight")


def test_row_05_lazy_parameters(kind):
    with raises(ValueError, "found lazy ones: '0.weight', '0.bias'", "Fix: run one forward pass"):
        kind(nn.Sequential(nn.LazyLinear(3)), Classification())


def test_row_05_lazy_parameters_that_are_not_protected(kind):
    # Its first forward would be that of the consolidation, and would change the model.
    model = nn.Sequential(nn.Linear(5, 4), nn.LazyLinear(3))
    with raises(ValueError, "found lazy ones: '1.weight', '1.bias'", "Fix: run one forward pass"):
        kind(model, Classification(), parameters=["0.weight"])


def test_row_05_meta_parameters(kind):
    names = "'0.weight', '0.bias', '2.weight', '2.bias'"
    with raises(ValueError, f"on the meta device: {names}", "Fix: materialise the model first"):
        kind(make_model(device="meta"), Classification())


@pytest.mark.parametrize(
    ("module", "what"),
    [(nn.LazyLinear(2), "lazy ones"), (nn.Linear(3, 2, device="meta"), "on the meta device")],
)
def test_row_05_added_later(kind, module, what):
    model, ewc = make(kind)
    model.append(copy.deepcopy(module))
    fisher = ewc.fisher
    with raises(ValueError, f"{what}: '3.weight', '3.bias'"):
        ewc.consolidate(make_task())
    assert ewc.n_tasks == 1
    assert all(torch.equal(one, fisher[name]) for name, one in ewc.fisher.items())
