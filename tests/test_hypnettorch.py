"""Every row of the table "hypnettorch's functions, and where each went", in numbers.

What hypnettorch computes is written out here for the oracle, one sample at a time; what it refuses
with NotImplementedError, by the definition. Last come the four faults that it has, and
that differ here on purpose.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ewc import (
    EWC,
    Classification,
    Custom,
    OnlineEWC,
    Regression,
    TimeSeries,
    context_mod_forward,
)
from tests import oracle
from tests.support.asserts import assert_close

N, INPUTS, CLASSES = 12, 4, 5

Grads = dict[str, Tensor]


@pytest.fixture
def mnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, INPUTS).double(), torch.randint(CLASSES, (N,))


def fisher(
    model: nn.Module,
    nlls: Callable[[Any, int], Tensor],
    samples: int = N,
    *,
    divisor: int | None = None,
) -> Grads:
    """`compute_fisher`: squared gradients of each sample's `nlls(model, n)`, averaged."""
    sums = oracle.squares(model, lambda model, n: nlls(model, n).reshape(-1), samples)
    return {name: each / (divisor or samples) for name, each in sums.items()}


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert_close(found, expected, 1e-13, relative=1e-9)


def move(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def weights(model: nn.Module) -> Grads:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def penalty(model: nn.Module, precision: Mapping[str, Any], anchor: Mapping[str, Tensor]) -> Tensor:
    """`ewc_regularizer`: with the factor 1/2, without lambda."""
    return 0.5 * sum(
        (precision[name] * (parameter - anchor[name]) ** 2).sum()
        for name, parameter in model.named_parameters()
    )


def test_task_id_is_the_number_of_consolidations(
    mnet: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    ewc = EWC(mnet, Classification(), strength=7.0)
    tasks = []
    for task in range(3):
        assert ewc.n_tasks == task
        ewc.consolidate([(x, y)])
        tasks.append(
            (fisher(mnet, lambda mnet, n: F.cross_entropy(mnet(x[n]), y[n])), weights(mnet))
        )
        move(mnet, task)
    expected = 7.0 * sum(penalty(mnet, f, anchor) for f, anchor in tasks)
    torch.testing.assert_close(ewc(), expected, rtol=1e-12, atol=0)
    found = torch.autograd.grad(ewc(), list(mnet.parameters()))
    for one, other in zip(
        found, torch.autograd.grad(expected, list(mnet.parameters())), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_online_and_gamma_are_online_ewc_and_decay(
    mnet: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    ewc = OnlineEWC(mnet, Classification(), strength=7.0, decay=0.9)
    total = {name: torch.zeros_like(p) for name, p in mnet.named_parameters()}
    anchor = weights(mnet)
    for task in range(3):
        ewc.consolidate([(x, y)])
        new = fisher(mnet, lambda mnet, n: F.cross_entropy(mnet(x[n]), y[n]))
        total = {name: new[name] + 0.9 * total[name] for name in total}
        anchor = weights(mnet)
        move(mnet, task)
    close(ewc.fisher, total)
    precision = {name: 0.9 * each for name, each in total.items()}
    torch.testing.assert_close(ewc(), 7.0 * penalty(mnet, precision, anchor), rtol=1e-12, atol=0)


def test_data_is_any_iterable_of_batches(mnet: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    expected = fisher(mnet, lambda mnet, n: F.cross_entropy(mnet(x[n]), y[n]))
    for batches in (
        DataLoader(TensorDataset(x, y), 5),
        [(x[:1], y[:1]), (x[1:], y[1:])],
        ({"input": x[i : i + 3], "labels": y[i : i + 3]} for i in range(0, N, 3)),
    ):
        ewc = EWC(mnet, Classification())
        ewc.consolidate(batches)
        close(ewc.fisher, expected)


def test_n_max_is_max_samples(mnet: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    ewc = EWC(mnet, Classification(), max_samples=7)
    assert ewc.consolidate(DataLoader(TensorDataset(x, y), 5)).samples == 7
    close(ewc.fisher, fisher(mnet, lambda mnet, n: F.cross_entropy(mnet(x[n]), y[n]), 7))


def test_device_is_that_of_the_parameters(mnet: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    ewc = EWC(mnet, Classification())
    ewc.consolidate([data])
    assert {each.device for each in (ewc(), *ewc.fisher.values(), *ewc.anchor.values())} == {
        parameter.device for parameter in mnet.parameters()
    }


def test_params_are_model_and_parameters(mnet: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    ewc = EWC(mnet, Classification(), parameters=["0.weight", "0.bias"])
    ewc.consolidate([data])
    expected = fisher(mnet, lambda mnet, n: F.cross_entropy(mnet(x[n]), y[n]))
    close(ewc.fisher, {name: expected[name] for name in ("0.weight", "0.bias")})


class Hypernetwork(nn.Module):
    """Makes the weights of a linear main network, for a task."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = nn.Embedding(3, 2)
        self.make = nn.Linear(2, CLASSES * INPUTS)

    def forward(self, task: int) -> Tensor:
        return self.make(self.tasks(torch.tensor(task))).view(CLASSES, INPUTS)


def test_hnet_is_a_model_with_a_forward(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    torch.manual_seed(2)
    hnet = Hypernetwork().double()
    ewc = EWC(hnet, Classification(), forward=lambda hnet, batch: F.linear(batch[0], hnet(1)))
    ewc.consolidate([data])
    close(ewc.fisher, fisher(hnet, lambda hnet, n: F.cross_entropy(hnet(1) @ x[n], y[n])))
    assert not ewc.fisher["tasks.weight"][[0, 2]].any()


def test_custom_forward_custom_nll_and_pass_ids(
    mnet: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    ids = torch.randperm(N)
    scale = torch.rand(N).double()

    def forward(mnet: nn.Module, batch: Any) -> Tensor:
        return mnet(batch[0] * scale[batch[2]].unsqueeze(1))

    def nll(outputs: Tensor, targets: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none") * (1 + ids)

    ewc = EWC(mnet, Custom(nll), forward=forward)
    ewc.consolidate(DataLoader(TensorDataset(x, y, ids), 5))

    def of_one(mnet: nn.Module, n: int) -> Tensor:
        return F.cross_entropy(mnet(x[n] * scale[ids[n]]), y[n]) * (1 + ids[n])

    close(ewc.fisher, fisher(mnet, of_one))


class Modulated(nn.Module):
    """As the networks of hypnettorch: own weights, and modulation weights from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.internal_params = nn.ParameterList(
            [torch.randn(CLASSES, INPUTS), torch.randn(CLASSES)]
        )

    def forward(self, x: Tensor, weights: dict[str, Any]) -> Tensor:
        gain, shift = weights["mod_weights"]
        return gain * F.linear(x, *weights["internal_weights"]).tanh() + shift


def test_context_mod_forward(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    torch.manual_seed(2)
    net = Modulated().double()
    gain, shift = torch.rand(CLASSES).double(), torch.rand(CLASSES).double()
    ewc = EWC(net, Classification(), forward=context_mod_forward([gain, shift]))
    ewc.consolidate([data])

    def of_one(net: nn.Module, n: int) -> Tensor:
        weight, bias = net.internal_params
        return F.cross_entropy(gain * (weight @ x[n] + bias).tanh() + shift, y[n])

    expected = fisher(net, of_one)
    close(ewc.fisher, expected)
    ewc.consolidate([data], forward=context_mod_forward(lambda batch: [gain, shift]))
    close(ewc.fisher, {name: 2 * each for name, each in expected.items()})


def test_regression_and_regression_lvar(mnet: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    x, targets = data[0], torch.randn(N, CLASSES).double()
    ewc = EWC(mnet, Regression(variance=0.3))
    ewc.consolidate([(x, targets)])
    close(
        ewc.fisher,
        fisher(mnet, lambda mnet, n: ((mnet(x[n]) - targets[n]) ** 2).sum() / (2 * 0.3)),
    )


@pytest.mark.parametrize("regression", [False, True])
def test_time_series(mnet: nn.Module, regression: bool) -> None:
    torch.manual_seed(3)
    x = torch.randn(6, N, INPUTS).double()  # time first, as there
    labels, values = torch.randint(CLASSES, (6, N)), torch.randn(6, N, CLASSES).double()
    step = Regression(variance=0.3) if regression else Classification()
    ewc = EWC(mnet, TimeSeries(step))
    ewc.consolidate([(x, values if regression else labels)])

    def of_one(mnet: nn.Module, n: int) -> Tensor:
        if regression:
            return ((mnet(x[:, n]) - values[:, n]) ** 2).sum() / (2 * 0.3)
        return F.cross_entropy(mnet(x[:, n]), labels[:, n], reduction="sum")

    close(ewc.fisher, fisher(mnet, of_one))


def test_allowed_outputs_and_target_manipulator(
    mnet: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    head = Classification(allowed_outputs=[3, 1], target_transform=lambda t: t % 2)
    ewc = EWC(mnet, Classification())
    ewc.consolidate([data], likelihood=head)
    expected = fisher(mnet, lambda mnet, n: F.cross_entropy(mnet(x[n])[[3, 1]], y[n] % 2))
    close(ewc.fisher, expected)
    one_hot = EWC(mnet, Classification(allowed_outputs=[3, 1]))
    one_hot.consolidate([(x, F.one_hot(y % 2, 2))])
    close(one_hot.fisher, expected)


def test_empirical_fisher_false_is_exact_or_mc(
    mnet: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data

    def of_one(mnet: nn.Module, n: int) -> Tensor:
        log_p = mnet(x[n]).log_softmax(0)
        return -log_p.detach().exp().sqrt() * log_p

    expected = fisher(mnet, of_one)
    exact = EWC(mnet, Classification(), fisher_type="exact")
    exact.consolidate([data])
    close(exact.fisher, expected)

    drawn = EWC(mnet, Classification(), fisher_type="mc")
    drawn.consolidate([x] * 1000, generator=torch.Generator().manual_seed(0))
    for name, each in drawn.fisher.items():
        assert (each - expected[name]).norm() < 0.05 * expected[name].norm()


def test_proper_scaling_is_the_sum(mnet: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    total = fisher(mnet, lambda mnet, n: F.cross_entropy(mnet(x[n]), y[n]), divisor=1)
    ewc = EWC(mnet, Classification(), reduction="sum")
    ewc.consolidate(DataLoader(TensorDataset(x, y), 5))
    close(ewc.fisher, total)

    part = EWC(mnet, Classification(), reduction="sum", max_samples=6)
    part.consolidate(DataLoader(TensorDataset(x, y), 5))
    of_part = fisher(mnet, lambda mnet, n: F.cross_entropy(mnet(x[n]), y[n]), 6)
    close(part.fisher, {name: N * each for name, each in of_part.items()})


def test_prior_strength_is_prior_precision(mnet: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    ewc = OnlineEWC(mnet, Classification(), strength=7.0, prior_precision=0.4)
    ewc.consolidate([data])
    without = fisher(mnet, lambda mnet, n: F.cross_entropy(mnet(x[n]), y[n]))
    anchor = weights(mnet)
    move(mnet, 0)
    close(ewc.fisher, without)
    precision = {name: each + 0.4 for name, each in without.items()}
    torch.testing.assert_close(ewc(), 7.0 * penalty(mnet, precision, anchor), rtol=1e-12, atol=0)


# The four faults.


def test_fault_1_the_penalty_does_not_change_what_it_penalises(
    mnet: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    ewc = OnlineEWC(mnet, Classification(), decay=0.5, strength=1.0)
    ewc.consolidate([data])
    stored = fisher(mnet, lambda mnet, n: F.cross_entropy(mnet(x[n]), y[n]))
    anchor = weights(mnet)
    move(mnet, 0)

    def there() -> Tensor:
        """`ewc_regularizer(online=True)` multiplies the buffer in place, at every call."""
        for name in stored:
            stored[name] = 0.5 * stored[name]
        return penalty(mnet, stored, anchor)

    first = there()
    torch.testing.assert_close(ewc(), first, rtol=1e-12, atol=0)
    for _ in range(20):
        later = there()
        torch.testing.assert_close(ewc(), first, rtol=1e-12, atol=0)
    assert later < 1e-5 * first


def test_fault_2_the_prior_enters_once_and_nothing_divides_it(
    mnet: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    ewc = OnlineEWC(mnet, Classification(), prior_precision=0.4, strength=1.0)
    for _ in range(3):
        ewc.consolidate([data])
    one = fisher(mnet, lambda mnet, n: F.cross_entropy(mnet(x[n]), y[n]))
    there = {name: 3 * (each + 0.4 / N) for name, each in one.items()}
    here = {name: 3 * each + 0.4 for name, each in one.items()}
    anchor = weights(mnet)
    move(mnet, 0)
    torch.testing.assert_close(ewc(), penalty(mnet, here, anchor), rtol=1e-12, atol=0)
    assert (ewc() - penalty(mnet, there, anchor)).abs() > 0.01 * ewc()


def test_fault_3_a_checkpoint_loads_into_a_fresh_network(
    mnet: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    ewc = EWC(mnet, Classification())
    names = list(mnet.state_dict())
    ewc.consolidate([data])
    ewc.consolidate([data])
    assert list(mnet.state_dict()) == names  # there: buffers of every task
    move(mnet, 0)
    fresh = copy.deepcopy(mnet)
    for layer in (fresh[0], fresh[2]):
        layer.reset_parameters()
    again = EWC(fresh, Classification())
    fresh.load_state_dict(mnet.state_dict())
    again.load_state_dict(ewc.state_dict())
    assert again.n_tasks == 2
    assert again().item() == ewc().item() > 0


def test_fault_4_gradients_are_not_touched(mnet: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    mnet[0].weight.grad = kept = torch.randn_like(mnet[0].weight)
    before = kept.clone()
    EWC(mnet, Classification()).consolidate([data])
    assert mnet[0].weight.grad is kept
    assert torch.equal(kept, before)
    assert mnet[2].weight.grad is None
