import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ewc.errors import InvalidBatch
from ewc.integrations.hypnettorch import context_mod_forward


class Modulated(nn.Module):
    """A linear layer whose outputs are scaled from outside, with hypnettorch's interface."""

    def __init__(self) -> None:
        super().__init__()
        self.internal_params = nn.ParameterList([torch.randn(3, 2), torch.randn(2)])

    def forward(self, x: Tensor, weights: dict[str, Any]) -> Tensor:
        assert set(weights) == {"mod_weights", "internal_weights"}
        weight, bias = weights["internal_weights"]
        (scale,) = weights["mod_weights"]
        return (x @ weight + bias) * scale


def by_task(batch: Any) -> list[Tensor]:
    return [batch[2].unsqueeze(-1)]


def test_a_list_of_weights() -> None:
    model, x, scale = Modulated(), torch.randn(4, 3), torch.tensor([2.0, 3.0])
    weight, bias = model.internal_params
    forward = context_mod_forward([scale])
    assert_close(forward(model, (x, None)), (x @ weight + bias) * scale)
    assert_close(forward(model, x), (x @ weight + bias) * scale)


def test_a_function_of_the_batch_inside_vmap() -> None:
    model, x, tasks = Modulated(), torch.randn(4, 3), torch.arange(4.0)
    forward = context_mod_forward(by_task)
    expected = forward(model, (x, None, tasks))
    found = torch.func.vmap(lambda x, t: forward(model, (x[None], None, t[None]))[0])(x, tasks)
    assert_close(found, expected)


def test_functional_calls_replace_the_internal_parameters() -> None:
    model, x = Modulated(), torch.randn(4, 3)
    forward = context_mod_forward([torch.ones(2)])

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Any:
            return forward(self.inner, (x,))

    weight, bias = torch.randn(3, 2, requires_grad=True), torch.randn(2, requires_grad=True)
    others = {"inner.internal_params.0": weight, "inner.internal_params.1": bias}
    found = torch.func.functional_call(Wrapper(), others, (x,))
    assert_close(found, x @ weight + bias)
    gradients = torch.autograd.grad(found.sum(), [weight, bias])
    assert_close(gradients, (x.sum(0).unsqueeze(1).expand(3, 2), torch.full((2,), 4.0)))


def test_copies_and_pickles() -> None:
    model, batch = Modulated(), (torch.randn(4, 3), None, torch.arange(4.0))
    forward = context_mod_forward(by_task)
    for other in (copy.deepcopy(forward), pickle.loads(pickle.dumps(forward))):
        assert torch.equal(other(model, batch), forward(model, batch))


@pytest.mark.parametrize("value", [None, 3, torch.zeros(2), [torch.zeros(2), 3], "weights"])
def test_invalid_weights(value: Any) -> None:
    with pytest.raises(TypeError, match=r"mod_weights must be .*; found"):
        context_mod_forward(value)


def test_inputs_that_are_not_one_tensor() -> None:
    with pytest.raises(InvalidBatch, match=r"one tensor of inputs; found the inputs \{'x'"):
        context_mod_forward([torch.ones(2)])(Modulated(), {"x": torch.randn(4, 3)})
