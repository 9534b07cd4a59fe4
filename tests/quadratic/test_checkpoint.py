import copy
import io

import pytest
import torch
from torch import nn

from ewc import EWC, Classification, NothingProtectedWarning, OnlineEWC
from tests.support.tasks import (
    CLASSES,
    INPUTS,
    make_ewc,
    make_model,
    make_task,
    same,
    same_state,
    shift,
)

KINDS = pytest.mark.parametrize("kind", [EWC, OnlineEWC])


def trained(kind=EWC, model=None, n_tasks=2, **options):
    model = make_model() if model is None else model
    ewc = kind(model, Classification(), **options)
    for seed in range(n_tasks):
        shift(model, seed)
        ewc.consolidate(make_task(seed))
    return model, ewc


def fresh(model, kind=EWC, **options):
    return kind(copy.deepcopy(model), Classification(), **options)


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def equal_objects(one, other):
    return (
        same_state(one, other.fisher, other.anchor)
        and one.n_tasks == other.n_tasks
        and torch.equal(one(), other())
    )


class TestForm:
    def test_keys(self):
        _, ewc = trained()
        state = ewc.state_dict()
        assert state["version"] == 1
        assert state["kind"] == "EWC"
        assert state["n_tasks"] == 2
        assert state["reduction"] == "mean"
        assert state["fisher_type"] == "empirical"
        assert state["parameters"] == list(ewc.fisher)
        assert same(state["fisher"], ewc.fisher)
        assert same(state["anchor"], ewc.anchor)
        assert set(state["free_rows"].values()) == {0}

    def test_online_keys(self):
        _, ewc = trained(OnlineEWC, decay=0.5, prior_precision=2.0)
        state = ewc.state_dict()
        assert (state["kind"], state["decay"], state["prior_precision"]) == ("OnlineEWC", 0.5, 2.0)

    def test_full_is_the_same_for_plain_tensors(self):
        _, ewc = trained()
        assert same(ewc.state_dict(full=True)["fisher"], ewc.state_dict()["fisher"])

    def test_fresh_object_writes_a_template(self):
        model, ewc = make_ewc()
        state = ewc.state_dict()
        assert state["n_tasks"] == 0
        assert same(state["anchor"], dict(model.state_dict()))
        assert not any(one.any() for one in state["fisher"].values())
        other = fresh(model)
        with pytest.warns(NothingProtectedWarning):
            other.load_state_dict(state)
        assert other.n_tasks == 0
        assert not other.fisher
        assert other().item() == 0.0

    @KINDS
    def test_round_trip(self, kind):
        model, ewc = trained(kind)
        shift(model, 7)
        other = fresh(model, kind)
        other.load_state_dict(through_file(ewc.state_dict()))
        assert equal_objects(other, ewc)

    def test_prior_by_name_round_trip(self):
        prior = {"0.bias": torch.rand(7), "2.weight": torch.rand(CLASSES, 7)}
        model, ewc = trained(OnlineEWC, prior_precision=prior)
        other = fresh(model, OnlineEWC, prior_precision=prior)
        other.load_state_dict(through_file(ewc.state_dict()))
        assert equal_objects(other, ewc)
        with pytest.raises(ValueError, match=r"'prior_precision' must be 0\.0, as in this"):
            fresh(model, OnlineEWC).load_state_dict(ewc.state_dict())

    @KINDS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_resumed_training_continues_bit_for_bit(self, kind, dtype):
        model, ewc = trained_in(kind, dtype)
        other_model = copy.deepcopy(model)
        other = kind(other_model, Classification())
        other.load_state_dict(through_file(ewc.state_dict()))
        for one_model, one in ((model, ewc), (other_model, other)):
            optimizer = torch.optim.SGD(one_model.parameters(), lr=0.1)
            for seed in range(2):
                one().backward()
                optimizer.step()
                one.consolidate(task_in(dtype, seed))
        assert equal_objects(other, ewc)

    def test_after_forget(self):
        model, ewc = trained()
        ewc.forget("0.weight")
        other = fresh(model)
        other.load_state_dict(ewc.state_dict())
        assert list(other.fisher) == list(ewc.fisher)
        assert equal_objects(other, ewc)

    def test_loads_into_an_object_in_use(self):
        model, ewc = trained()
        state = ewc.state_dict()
        shift(model, 5)
        expected = ewc().item()
        ewc.consolidate(make_task(5))
        ewc.load_state_dict(state)
        assert ewc.n_tasks == 2
        assert ewc().item() == expected

    def test_never_narrowed(self):
        model, ewc = trained(model=make_model(dtype=torch.float64), n_tasks=0)
        ewc.consolidate(task_in(torch.float64, 0))
        other = EWC(copy.deepcopy(model).float(), Classification())
        other.load_state_dict(ewc.state_dict())
        assert all(one.dtype is torch.float64 for one in other.fisher.values())
        assert other().dtype is torch.float32

    def test_a_scalar_parameter(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.tensor(2.0))

            def forward(self, x):
                return self.scale * x[:, :CLASSES]

        model, ewc = make_ewc(Scaled())
        other = EWC(model, Classification())
        with pytest.warns(NothingProtectedWarning):
            other.load_state_dict(ewc.state_dict())
        assert not other.fisher
        ewc.consolidate(make_task())
        other.load_state_dict(ewc.state_dict())
        assert same(other.fisher, ewc.fisher)


def task_in(dtype, seed):
    return [(x.to(dtype), y) for x, y in make_task(seed)]


def trained_in(kind, dtype):
    model = make_model(dtype=dtype)
    ewc = kind(model, Classification())
    for seed in range(2):
        shift(model, seed)
        ewc.consolidate(task_in(dtype, seed))
    shift(model, 2)
    return model, ewc


def test_load_keeps_the_strength():
    model, ewc = trained(strength=5.0)
    other = fresh(model, strength=2.0)
    other.load_state_dict(ewc.state_dict())
    assert other.strength == 2.0


def test_chosen_names_may_be_fewer_when_loading():
    model, ewc = trained()
    other = fresh(model, parameters=["2.weight"])
    other.load_state_dict(ewc.state_dict())
    # Known from before, and so still counted; only what is chosen is collected.
    assert list(other.fisher) == list(ewc.fisher)
    other.consolidate(make_task(INPUTS))
    assert torch.equal(other.fisher["0.weight"], ewc.fisher["0.weight"])
    assert not torch.equal(other.fisher["2.weight"], ewc.fisher["2.weight"])
