"""Rows 33 to 37: parameters that are tied, replaced, grown, gone, frozen or added."""

import copy
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from ewc import EWC, Classification, OnlineEWC, ReplacedParameterWarning
from tests import oracle
from tests.support.asserts import assert_close, raises, unchanged
from tests.support.tasks import (
    CLASSES,
    INPUTS,
    as_task,
    grow,
    make,
    make_model,
    make_task,
    same,
    shift,
    written_out,
)


def make_square():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.Tanh(), nn.Linear(INPUTS, INPUTS))


def test_row_33_tied_weights(kind):
    model = make_square()
    model[2].weight = model[0].weight
    ewc = kind(model, Classification())
    task = make_task()
    ewc.consolidate(task)
    assert list(ewc.fisher) == ["0.weight", "0.bias", "2.bias"]
    assert_close(ewc.fisher, oracle.fisher(model, task))
    shift(model)
    assert ewc().item() == pytest.approx(written_out([as_task(ewc)], model, ewc.strength).item())


def test_row_33_chosen_by_the_other_name(kind):
    model = make_square()
    model[2].weight = model[0].weight
    ewc = kind(model, Classification(), parameters=["2.weight"])
    ewc.consolidate(make_task())
    assert list(ewc.fisher) == ["0.weight"]


def test_row_33_tied_later(kind):
    model = make_square()
    ewc = kind(model, Classification())
    ewc.consolidate(make_task())
    fisher, anchor = as_task(ewc)
    model[2].weight = model[0].weight
    # Both old anchors pull at the parameter that has taken both names.
    both = (model[0].weight, model[2].weight)
    expected = (
        0.5
        * ewc.strength
        * sum(
            (fisher[name] * (p - anchor[name]) ** 2).sum()
            for name, p in zip(("0.weight", "2.weight"), both, strict=True)
        )
    )
    assert ewc().item() == pytest.approx(expected.item())
    torch.testing.assert_close(
        torch.autograd.grad(ewc(), both[0]), torch.autograd.grad(expected, both[0])
    )


def test_row_33_chosen_and_tied_later(kind):
    model = make_square()
    ewc = kind(model, Classification(), parameters=["0.weight", "2.weight"])
    model[2].weight = model[0].weight
    ewc.consolidate(make_task())
    assert list(ewc.fisher) == ["0.weight"]


@pytest.mark.parametrize("what", ["parameter", "module", "data"])
def test_row_34_replaced(kind, what):
    model, ewc = make(kind, n_tasks=0)
    ewc.consolidate(make_task())
    assert ewc().item() == 0.0
    new = nn.Linear(INPUTS, 7)
    if what == "parameter":
        model[0].weight = new.weight
    elif what == "module":
        model[0] = new
    else:
        model[0].weight.data = new.weight.detach()
    expected = written_out([as_task(ewc)], model, ewc.strength).item()
    with nullcontext() if what == "data" else pytest.warns(ReplacedParameterWarning):
        assert ewc().item() == pytest.approx(expected)
    ewc().backward()
    assert model[0].weight.grad.any()
    ewc.consolidate(make_task(1))
    assert ewc.n_tasks == 2


@pytest.mark.parametrize("rows", [CLASSES, CLASSES + 2])
def test_row_34a_a_new_head_under_an_old_name(kind, rows):
    model, ewc = make(kind)
    ewc()
    model[2] = nn.Linear(7, rows)
    with pytest.warns(ReplacedParameterWarning) as caught:
        ewc()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "forget('2.weight', '2.bias')" in str(caught[0].message)
    ewc()
    model[2] = nn.Linear(7, rows)
    ewc()  # once for each name
    model[0] = nn.Linear(INPUTS, 7)
    with pytest.warns(ReplacedParameterWarning, match=r"forget\('0.weight', '0.bias'\)"):
        ewc()


def test_row_34a_found_by_a_consolidation(kind):
    model, ewc = make(kind)
    model[2] = nn.Linear(7, CLASSES)
    with pytest.warns(ReplacedParameterWarning) as caught:
        ewc.consolidate(make_task(1))
    assert [one.filename for one in caught] == [__file__]
    ewc()
    ewc.consolidate(make_task(1))


def test_row_34a_turned_into_an_error(kind):
    model, ewc = make(kind)
    model[2] = nn.Linear(7, CLASSES)
    for call in (ewc, lambda: ewc.consolidate(make_task(1))) * 2:
        with unchanged(ewc, model), raises(ReplacedParameterWarning, "'2.weight'"):
            call()


def test_row_34a_released(kind):
    model, ewc = make(kind)
    ewc()
    model[2] = nn.Linear(7, CLASSES)
    ewc.forget("2.weight", "2.bias")
    ewc()
    ewc.consolidate(make_task(1))
    assert list(ewc.fisher) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(ewc.anchor["2.weight"], model[2].weight)


def parameters_by(convert):
    """Replaces every parameter object of some modules by one with the same or similar values."""

    def apply(model):
        for module in model:
            for name, parameter in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(convert(parameter.detach().clone())))

    return apply


def converted(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16).to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def swapped(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def through_meta(model):
    saved = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(saved)


def loaded(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def loaded_others(model):
    model.load_state_dict({n: one + 1 for n, one in model.state_dict().items()}, assign=True)


def merged_adapter(model):
    new = nn.Linear(7, CLASSES)
    with torch.no_grad():
        new.weight.copy_(model[2].weight + 0.02 * torch.randn(CLASSES, 1) @ torch.randn(1, 7))
        new.bias.copy_(model[2].bias)
    model[2] = new


REPLACEMENTS = {
    "same values": parameters_by(lambda one: one),
    "half": parameters_by(torch.Tensor.half),
    "wider": parameters_by(torch.Tensor.double),
    "trained a little": parameters_by(lambda one: one + 0.01),
    "conversion": converted,
    "swapped tensors": swapped,
    "meta": through_meta,
    "loaded": loaded,
    "another checkpoint": loaded_others,
    "head, same values": lambda model: parameters_by(lambda one: one)(model[2:]),
    "copied module": lambda model: model.__setitem__(2, copy.deepcopy(model[2])),
    "adapter": merged_adapter,
    "grown": grow,
    "compiled": lambda model: model.__setitem__(2, torch.compile(model[2], backend="eager")),
    "checkpointed": lambda model: model.__setitem__(2, checkpoint_wrapper(model[2])),
    "frozen": lambda model: model.requires_grad_(False),
    "other data": lambda model: setattr(model[2].weight, "data", torch.ones(CLASSES, 7)),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS.keys())
def test_row_34a_no_false_alarm(kind, replace):
    model, ewc = make(kind)
    ewc()
    replace(model)
    assert ewc().isfinite()


def test_row_34a_no_false_alarm_when_objects_are_copied_or_loaded(kind):
    model, ewc = make(kind)
    ewc()
    both = copy.deepcopy({"model": model, "ewc": ewc})
    both["model"][2] = nn.Linear(7, CLASSES)
    both["ewc"]()  # a copy has not seen the parameters before
    state = ewc.state_dict()
    shift(model)
    model.load_state_dict({n: one.flip(0) for n, one in model.state_dict().items()}, assign=True)
    ewc.load_state_dict(state)
    ewc()


def test_row_34a_no_false_alarm_inside_functional_call(kind):
    model, ewc = make(kind)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return ewc()

    step = Step()
    others = {f"model.{n}": torch.randn_like(p) for n, p in model.named_parameters()}
    before = ewc().item()
    assert torch.func.functional_call(step, others, ()).item() != before
    assert ewc().item() == before


def test_row_35_a_grown_head(kind):
    model, ewc = make(kind, n_tasks=0)
    ewc.consolidate(make_task())
    old, anchor = as_task(ewc)
    grow(model)
    assert ewc().item() == 0.0
    shift(model)
    rows = {"2.weight": model[2].weight[:CLASSES], "2.bias": model[2].bias[:CLASSES]}
    now = {**dict(model.named_parameters()), **rows}
    expected = 0.5 * ewc.strength * sum((old[n] * (now[n] - anchor[n]) ** 2).sum() for n in old)
    assert ewc().item() == pytest.approx(expected.item(), rel=1e-5)
    ewc().backward()
    assert model[2].weight.grad[:CLASSES].any()
    assert not model[2].weight.grad[CLASSES:].any()
    torch.testing.assert_close(
        [p.grad for p in model.parameters()],
        list(torch.autograd.grad(expected, list(model.parameters()))),
    )

    task = [(x, y + 2) for x, y in make_task(1)]
    new = {name: each.float() for name, each in oracle.fisher(model, task).items()}
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


def test_row_35_grown_in_place(kind):
    model, ewc = make(kind, n_tasks=0)
    ewc.consolidate(make_task())
    weight, bias = model[2].weight, model[2].bias
    weight.data = torch.cat([weight.detach(), torch.ones(1, 7)])
    bias.data = torch.cat([bias.detach(), torch.ones(1)])
    assert ewc().item() == 0.0
    ewc().backward()
    assert weight.grad.shape == (CLASSES + 1, 7)


def test_row_35_grown_and_frozen(kind):
    model, ewc = make(kind, n_tasks=0)
    ewc.consolidate(make_task())
    head = {name: ewc.fisher[name] for name in ("2.weight", "2.bias")}
    grow(model)
    model[2].requires_grad_(False)
    ewc.consolidate(make_task(1))
    fisher, anchor = as_task(ewc)
    assert same({name: fisher[name] for name in head}, head)
    shift(model)
    now = dict(model.named_parameters())
    expected = (
        0.5
        * ewc.strength
        * sum(
            (fisher[name] * (now[name][: len(fisher[name])] - anchor[name]) ** 2).sum()
            for name in fisher
        )
    )
    assert ewc().item() == pytest.approx(expected.item(), rel=1e-5)
    ewc().backward()
    assert model[2].weight.grad is None


@pytest.mark.parametrize("by_name", [False, True])
def test_row_35_rows_and_a_prior(by_name):
    prior = {"2.bias": torch.ones(CLASSES)} if by_name else 1.0
    model, ewc = make(OnlineEWC, n_tasks=0, decay=0.0, prior_precision=prior, strength=1.0)
    ewc.consolidate(make_task())
    grow(model, 1)
    assert ewc().item() == 0.0
    with torch.no_grad():
        model[2].bias[CLASSES] += 1.0
    assert ewc().item() == 0.0
    ewc.consolidate(make_task())
    with torch.no_grad():
        model[2].bias[CLASSES] += 1.0
    # A prior by name says nothing about a row that was not there.
    assert ewc().item() == (0.0 if by_name else 0.5)


def test_row_35_saved_after_the_model_grew(kind):
    options = {"prior_precision": 1.0} if kind is OnlineEWC else {}
    model, ewc = make(kind, n_tasks=2, **options)
    grow(model, 1)
    model.append(nn.Linear(CLASSES + 1, CLASSES))
    shift(model, 5)
    state = ewc.state_dict()
    assert state["fisher"]["2.weight"].shape == model[2].weight.shape
    assert state["free_rows"] == {
        **dict.fromkeys(state["parameters"], 0),
        "2.weight": 1,
        "2.bias": 1,
        "3.weight": CLASSES,
        "3.bias": CLASSES,
    }
    other = kind(model, Classification(), **options)
    other.load_state_dict(state)  # without a warning: the state knows these parts
    for seed in (None, 6):
        if seed is not None:
            ewc.consolidate(make_task(seed))
            other.consolidate(make_task(seed))
        assert same(other.fisher, ewc.fisher)
        assert same(other.anchor, ewc.anchor)
        assert torch.equal(other(), ewc())


CHANGES = {
    "fewer rows": (
        lambda m: m.__setitem__(2, nn.Linear(7, 2)),
        "'2.weight' has changed its shape from (3, 7) to (2, 7)",
    ),
    "columns": (
        lambda m: m.__setitem__(2, nn.Linear(8, 3)),
        "'2.weight' has changed its shape from (3, 7) to (3, 8)",
    ),
    "deleted": (lambda m: m.__delitem__(2), "'2.weight' is gone"),
    "replaced": (lambda m: m.__setitem__(2, nn.Identity()), "'2.weight' is gone"),
    "parametrized": (
        lambda m: parametrizations.weight_norm(m[2]),
        "'2.weight' has been parametrized",
    ),
}


@pytest.mark.parametrize(("change", "what"), CHANGES.values(), ids=CHANGES.keys())
def test_row_36_changed(kind, change, what):
    model, ewc = make(kind, n_tasks=0)
    ewc.consolidate(make_task())
    change(model)
    for call in (ewc, lambda: ewc.consolidate(make_task()), ewc.state_dict):
        with (
            unchanged(ewc, model),
            raises(ValueError, what, "must keep their names", "grow along", "forget(") as error,
        ):
            call()
    released = re.search(r"forget\((.*)\)", str(error.value)).group(1)
    ewc.forget(*re.findall(r"'([^']*)'", released))
    assert list(ewc.fisher)[:2] == ["0.weight", "0.bias"]
    # The bias of a head with other columns has kept its shape, and is a new one too.
    with pytest.warns(ReplacedParameterWarning) if "(3, 8)" in what else nullcontext():
        assert ewc().isfinite()


def test_row_36_hundreds_of_parameters_are_gone(kind):
    model = nn.Sequential(nn.Linear(INPUTS, CLASSES), *(nn.Linear(1, 1) for _ in range(300)))
    ewc = kind(model, Classification(), forward=lambda m, batch: m[0](batch[0]) + unused(m))
    with pytest.warns(UserWarning, match="zero"):
        ewc.consolidate(make_task())
    for index in range(1, 301):
        model[index] = nn.Identity()
    parts = ("'1.weight' is gone", "(600 in all)", "forget('1.weight', '1.bias', ")
    with unchanged(ewc, model), raises(ValueError, *parts) as caught:
        ewc()
    assert len(str(caught.value)) < 1000
    wrong = [f"{name}_" for name in ewc.fisher]
    with (
        unchanged(ewc, model),
        raises(ValueError, "'0.weight_' (nearest: '0.weight'", "(602 in all)"),
    ):
        ewc.forget(*wrong)
    with raises(ValueError, "no parameter is named '0.weight_' (nearest: '0.weight'", "602 in all"):
        kind(model, Classification(), parameters=wrong)
    ewc.forget(*list(ewc.fisher)[2:])
    assert list(ewc.fisher) == ["0.weight", "0.bias"]
    assert ewc().item() == 0.0


def unused(model):
    return sum(0.0 * one.weight.sum() for one in list(model)[1:])


def test_row_36_broadcastable_shapes_are_no_match(kind):
    model = nn.Sequential(nn.Linear(INPUTS, 1), nn.Linear(1, CLASSES))
    ewc = kind(model, Classification())
    ewc.consolidate(make_task())
    model[1] = nn.Linear(6, CLASSES)
    with unchanged(ewc, model), raises(ValueError, "(3, 1) to (3, 6)", "forget('1.weight')"):
        ewc()


def test_row_36_a_chosen_name_gone_before_the_first_task(kind):
    model = make_model()
    ewc = kind(model, Classification(), parameters=["0.weight", "2.weight"])
    model[2] = nn.Identity()
    with unchanged(ewc, model), raises(ValueError, "'2.weight' is gone", "forget('2.weight')"):
        ewc.consolidate(make_task())
    ewc.forget("2.weight")
    ewc.consolidate([(x, y + 4) for x, y in make_task()])
    assert list(ewc.fisher) == ["0.weight"]


def test_row_36a_forgetting_a_name_that_is_unknown(kind):
    model, ewc = make(kind)
    with (
        unchanged(ewc, model),
        raises(ValueError, "'0.wieght' (nearest: '0.weight'", "'2.bais' (nearest: '2.bias'"),
    ):
        ewc.forget("0.bias", "0.wieght", "2.bais")
    for names in ((), (["0.bias"],), (3,)):
        with unchanged(ewc, model), raises(TypeError, "forget must get one or more names of"):
            ewc.forget(*names)


def test_row_37_frozen_later():
    model, ewc = make(EWC)
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


def test_row_37_frozen_later_decays_around_its_anchor():
    model, ewc = make(OnlineEWC, decay=0.5)
    expected = ewc().item()
    fisher, anchor = as_task(ewc)
    model[0].requires_grad_(False)
    assert ewc().item() == expected
    ewc.consolidate(make_task(1))
    assert torch.equal(ewc.fisher["0.weight"], 0.5 * fisher["0.weight"])
    assert torch.equal(ewc.anchor["0.weight"], anchor["0.weight"])
    assert torch.equal(ewc.anchor["2.weight"], model[2].weight)


def test_row_37_frozen_and_saved(kind):
    model, ewc = make(kind, n_tasks=2)
    model[0].requires_grad_(False)
    other = kind(model, Classification())
    other.load_state_dict(ewc.state_dict())
    assert same(other.fisher, ewc.fisher)
    assert torch.equal(other(), ewc())


def test_row_37_a_module_added(kind):
    model, ewc = make(kind, n_tasks=0)
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


def test_row_37_a_prior_enters_with_the_first_consolidation():
    model, ewc = make(OnlineEWC, n_tasks=0, decay=0.0, prior_precision=1.0)
    ewc.consolidate(make_task())
    model.append(nn.Linear(CLASSES, CLASSES))
    shift(model[3])
    assert ewc().item() == 0.0
    ewc.consolidate(make_task())
    shift(model[3])
    assert ewc().item() > 0.0


def test_row_37_added_in_front_keeps_the_canonical_order(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, CLASSES)

        def forward(self, x):
            return self.last(self.first(x))

    model = Model()
    model.first.requires_grad_(False)
    ewc = kind(model, Classification())
    ewc.consolidate(make_task())
    assert list(ewc.fisher) == ["last.weight", "last.bias"]
    model.first.requires_grad_(True)
    ewc.consolidate(make_task())
    assert list(ewc.fisher) == list(dict(model.named_parameters()))
