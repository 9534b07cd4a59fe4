import pytest
import torch
from torch import nn

from ewc.model.names import named_parameters
from ewc.model.selection import check_released, select


def test_names_in_canonical_order_once(model):
    assert select(model, ["2.bias", "0.weight", "2.bias"]) == ("0.weight", "2.bias")


def test_pairs(model):
    assert select(model, model[2].named_parameters(prefix="2")) == ("2.weight", "2.bias")


def test_pairs_of_a_wrapper(model):
    wrapped = torch.compile(model, backend="eager")
    assert all(name.startswith("_orig_mod.") for name, _ in wrapped.named_parameters())
    expected = tuple(named_parameters(model))
    assert select(wrapped, wrapped.named_parameters()) == expected
    assert select(wrapped, [name for name, _ in wrapped.named_parameters()]) == expected
    assert select(wrapped, expected) == expected
    assert select(model, wrapped.named_parameters()) == expected


def test_tied_name_is_the_canonical_one(tied):
    assert select(tied, ["decoder.weight"]) == ("encoder.weight",)
    assert select(tied, [("decoder.weight", tied.decoder.weight)]) == ("encoder.weight",)


def test_unknown_name_shows_the_nearest(model):
    with pytest.raises(ValueError, match=r"'0\.wieght'.*'0\.weight'"):
        select(model, ["0.wieght"])


def test_all_that_is_wrong_at_once(model):
    model[0].bias.requires_grad_(False)
    other = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="named 'x'") as error:
        select(model, ["x", "0.bias", ("mine", other), ("0.weight", model[2].weight)])
    for part in ("'0.bias' is frozen", "'mine' is paired with a tensor", "named '2.weight'"):
        assert part in str(error.value)


@pytest.mark.parametrize("wrong", ["0.weight", b"0.weight", 3])
def test_not_an_iterable_of_names(model, wrong):
    with pytest.raises(TypeError, match="iterable of names"):
        select(model, wrong)


@pytest.mark.parametrize("item", [3, ("0.weight",), ("0.weight", 3), (3, torch.zeros(2))])
def test_wrong_item(model, item):
    with pytest.raises(TypeError, match="a name or a"):
        select(model, [item])


def test_bare_parameters_are_refused(model):
    with pytest.raises(TypeError, match="named_parameters"):
        select(model, model.parameters())


def test_an_unknown_name_to_release_shows_each_of_the_nearest_once():
    known = ["0.weight", "2.weight", "0.weight"]
    with pytest.raises(ValueError, match=r"nearest: '0.weight', '2.weight'\)"):
        check_released(["_orig_mod.0.weight"], known)
