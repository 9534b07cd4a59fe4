import pytest
import torch
from torch import nn

from ewc._checks import as_float, check_initialised, check_materialised, choice, number
from tests.support.asserts import raises


def test_values_are_returned():
    assert number("x", 3) == 3.0
    assert type(number("x", 3)) is float
    assert number("x", 0.5, high=1.0) == 0.5
    assert choice("x", "a", ("a", "b")) == "a"
    assert as_float(10**400) == float("inf")


@pytest.mark.parametrize("check", [check_initialised, check_materialised])
def test_lazy_parameters_are_all_named(check):
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with raises(ValueError, "found lazy ones: '1.weight', '1.bias'."):
        check(model.named_parameters())


def test_meta_parameters_are_all_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    check_initialised(model.named_parameters())
    with raises(ValueError, "on the meta device: '1.weight', '1.bias'."):
        check_materialised(model.named_parameters())
    model.to_empty(device=torch.device("cpu"))
    check_materialised(model.named_parameters())
