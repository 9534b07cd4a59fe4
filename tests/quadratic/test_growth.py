"""The cost of all that goes over parameters by name is linear in their number.

Calls of functions are counted, not seconds. Names count their comparisons, so that a search through
a list is seen too.
"""

import cProfile
import pstats

import pytest
import torch
from torch import nn

from ewc import EWC, Classification, OnlineEWC


class Name(str):
    """A name that is compared by a function, which the profiler counts."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other):
        return str.__eq__(self, other)


class Many(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scales = nn.ParameterList(torch.ones(4) for _ in range(size))

    def forward(self, x):
        for scale in self.scales:
            x = x + scale
        return x


def calls_of(function):
    profile = cProfile.Profile()
    profile.enable()
    try:
        function()
    except ValueError:
        pass
    finally:
        profile.disable()
    return pstats.Stats(profile).total_calls


def renamed(state):
    def new(name, index):
        return Name(name.replace("scales", "shifts") if index % 2 else name)

    names = {name: new(name, index) for index, name in enumerate(state["parameters"])}
    tables = {
        key: {names[name]: one for name, one in value.items()} if isinstance(value, dict) else value
        for key, value in state.items()
    }
    return {**tables, "parameters": list(names.values())}


def counts(kind, size):
    torch.manual_seed(0)
    model = Many(size)
    task = [(torch.randn(4, 4), torch.arange(4)), (torch.randn(4, 4), torch.arange(4))]
    ewc = kind(model, Classification())
    ewc.consolidate(task)
    state = ewc.state_dict()
    named = {
        key: {Name(k): v for k, v in one.items()} if isinstance(one, dict) else one
        for key, one in state.items()
    }
    named["parameters"] = list(map(Name, state["parameters"]))
    names = list(map(Name, state["parameters"]))
    wrong = [Name(f"{name}_") for name in names]
    chosen = kind(model, Classification(), parameters=names)
    found = {
        "consolidate": calls_of(lambda: ewc.consolidate(task)),
        "state_dict": calls_of(ewc.state_dict),
        "load_state_dict": calls_of(lambda: ewc.load_state_dict(named)),
        "first penalty after a load": calls_of(ewc),
        "penalty": calls_of(ewc),
        "fisher": calls_of(lambda: ewc.fisher),
        "select": calls_of(lambda: kind(model, Classification(), parameters=names)),
        "select unknown names": calls_of(lambda: kind(model, Classification(), parameters=wrong)),
        "load renamed": calls_of(lambda: ewc.load_state_dict(renamed(state))),
        "forget unknown names": calls_of(lambda: ewc.forget(*wrong)),
        "forget": calls_of(lambda: chosen.forget(*names[::2])),
    }
    for scale in model.scales:
        scale.data = torch.ones(5)
    found["other shapes"] = calls_of(ewc)
    model.scales = nn.ParameterList()
    found["gone"] = calls_of(ewc)
    return found


@pytest.mark.parametrize("kind", [EWC, OnlineEWC])
def test_linear_in_the_number_of_parameters(kind):
    few, many = counts(kind, 60), counts(kind, 240)
    # The first 32 names are searched exactly, the others by a cheap comparison.
    quadratic = {key: (few[key], many[key]) for key in few if many[key] > 5.5 * few[key]}
    assert not quadratic
