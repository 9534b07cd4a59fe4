"""Data-dependent control flow: samples that take the same branch are run together."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import oracle
from tests.oracle import nll
from tests.support.asserts import assert_close
from tests.support.collecting import collected


class Masked(nn.Module):
    """Leaves out what a full mask would not change, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, :, 0] > -1
        if mask.all():
            return self.a(x).sum(1)
        return (self.b(x).tanh() * mask.unsqueeze(2)).sum(1)


class Lengths(nn.Module):
    """Cuts the padding off, and runs as many steps as a sample has."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for t in range(int(lengths.max())):
            state = self.step(state + x[:, t]).tanh()
        return self.read(state)


class Until(nn.Module):
    """Runs until a sample is done."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        left = x[:, 0].abs().ceil().clamp(max=4)
        while (left > 0).any():
            x = torch.where((left > 0).unsqueeze(1), self.step(x).tanh(), x)
            left = left - 1
        return self.read(x)


def check(net: nn.Module, inputs: Any, path: str) -> None:
    torch.manual_seed(1)
    net = net.double()
    samples = len(inputs[0] if isinstance(inputs, tuple) else inputs)
    targets = torch.randint(3, (samples,))
    found = collected(net, [(inputs, targets)])
    assert found.samples == samples
    assert_close(found.sums, oracle.empirical(net, (inputs, targets), nll), 1e-9)
    assert set(found.paths.values()) - {"unused"} == {path}


@pytest.mark.parametrize("seed", range(3))
def test_samples_of_one_branch_are_run_together(seed: int) -> None:
    torch.manual_seed(seed)
    check(Masked(), torch.randn(12, 3, 4).double(), "rule")
    lengths = torch.randint(1, 4, (12,))
    check(Lengths(), (torch.randn(12, 3, 4).double(), lengths), "rule")
    check(Until(), 2 * torch.randn(16, 4).double(), "rule")


def test_branches_that_the_first_two_samples_take_or_do_not() -> None:
    x = torch.randn(12, 3, 4).double().clamp(min=-0.9)
    check(Masked(), x, "rule")
    x[5:7, 0, 0] = -2  # not among those that the fast path was verified on
    check(Masked(), x, "rule")
    check(Masked(), x[5:6].repeat(2, 1, 1), "rule")
    check(Masked(), x[4:6], "rule")


def test_values_that_nearly_all_differ_go_by_loop() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x / x.abs().max().item())

    check(Scaled(), torch.randn(9, 4).double(), "loop")
    check(Scaled(), torch.randn(1, 4).double(), "rule")


def test_a_branch_on_whether_a_value_occurs() -> None:
    class Padded(nn.Module):
        """Looks for padding, as the models of transformers do."""

        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(5, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            rows = self.rows(tokens)
            return rows[:, :-1].mean(1) if 0 in tokens[:, [-1, 0]] else rows.sum(1)

    torch.manual_seed(0)
    check(Padded(), torch.randint(5, (12, 4)), "rule")
    check(Padded(), torch.randint(1, 5, (12, 4)), "rule")


def test_not_a_number_equals_no_other_value() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            largest = x.abs().max().item()
            return self.layer(x.nan_to_num() if largest != largest else x.sin())

    x = torch.randn(2, 4).double().repeat(6, 1)
    x[[1, 4, 9], 0] = torch.nan
    check(Checked(), x, "rule")


def test_a_branch_on_a_parameter_is_the_same_for_all_samples() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.ones(()))
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if (self.gate * 2).item() > 1 and self.gate > 0:
                x = x * self.gate
            return F.relu(self.layer(x))

    net = Gated().double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    found = collected(net, [(x, y)])
    assert_close(found.sums, oracle.empirical(net, (x, y), nll), 1e-9)
    assert set(found.paths.values()) == {"rule"}
