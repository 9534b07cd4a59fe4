import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from ewc.model.live import LiveParameters
from ewc.model.names import named_parameters


@pytest.fixture
def live(model):
    return LiveParameters(model, named_parameters(model))


def test_is_current_while_only_values_change(model, live):
    assert live.parameters == list(model.parameters())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    model[0].weight.requires_grad_(False)
    model.eval()
    assert live.is_current()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())),
        lambda m: m.__setitem__(0, nn.Linear(5, 7)),
        lambda m: m.__delitem__(0),
        lambda m: m.__setitem__(0, checkpoint_wrapper(m[0])),
        lambda m: delattr(m[0], "weight"),
        lambda m: parametrizations.weight_norm(m[0]),
        lambda m: m.double(),
        lambda m: setattr(m[0].weight, "data", torch.zeros(9, 5)),
    ],
    ids=["parameter", "module", "gone", "wrapped", "deleted", "parametrized", "dtype", "shape"],
)
def test_notices_a_change_of(model, live, change):
    change(model)
    assert not live.is_current()


def test_notices_a_replaced_inner_module():
    model = nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(2, 2))))
    live = LiveParameters(model, named_parameters(model))
    assert live.is_current()
    model[0]._checkpoint_wrapped_module[0] = nn.Linear(2, 2)
    assert not live.is_current()


def test_refuses_a_name_with_a_dot_of_its_own():
    model = nn.Module()
    model._modules["a.b"] = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"without a dot; found no path to 'a\.b\.weight'"):
        LiveParameters(model, named_parameters(model))
