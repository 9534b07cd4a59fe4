"""Row 17: Ctrl-C at any moment. `docs/benchmarks/interrupts.py` tries thousands of them."""

import random
import sys

import pytest
import torch
from torch import nn

from ewc import EWC, Classification
from ewc._strength import FACTOR
from tests.support.asserts import unchanged
from tests.support.interrupts import CASES, Case, Interrupt, Mixed
from tests.support.tasks import make, make_model, make_task

SWITCHES = (
    "torch/overrides.py",
    "torch/autograd/grad_mode.py",
    "torch/amp/autocast_mode.py",
    "torch/_functorch/vmap.py",
    "contextlib.py",
    "ewc/_vmap.py",
    "ewc/_restoring.py",
    "ewc/fisher/environment.py",
    "ewc/_switches.py",
    "ewc/model/guard.py",
    "ewc/model/randomness.py",
)
"""The files in which something is switched, or switched back."""


@pytest.mark.parametrize("of_c", [False, True], ids=["lines", "functions of C"])
@pytest.mark.parametrize("case", ["rule", "vmap", "branches", "draws", "mc, online"])
def test_row_17_ctrl_c_where_something_is_switched(case, of_c):
    interrupted = CASES[case].interrupted(of_c=of_c)
    steps = {}
    for step, place in enumerate(interrupted.places(), 1):
        if any(name in place for name in SWITCHES):
            steps.setdefault(place, []).append(step)
    chance = random.Random(case)
    for place in chance.sample(sorted(steps), 3):
        interrupted.at(chance.choice(steps[place]))


def test_row_17_ctrl_c_where_gradients_and_inference_mode_were_off():
    interrupted = Case(Mixed).interrupted(of_c=False)
    steps = len(interrupted.places())
    for switched in (torch.no_grad, torch.inference_mode):
        with switched():
            for step in random.Random(0).sample(range(1, steps), 4):
                interrupted.at(step)


@pytest.mark.parametrize("of_c", [False, True], ids=["lines", "functions of C"])
@pytest.mark.parametrize("what", ["load", "release", "assignment"])
def test_row_17_ctrl_c_leaves_the_strength_of_the_state(what, of_c):
    _, ewc = make(EWC)
    before = ewc.state_dict()
    _, other = make(EWC, n_tasks=2)
    state = other.state_dict()
    top = max(ewc.fisher, key=lambda name: ewc.fisher[name].max().item())

    def run():
        if what == "load":
            ewc.load_state_dict(state)
        elif what == "release":
            ewc.forget(top)
        else:
            ewc.strength = "auto"

    def reset():
        ewc.load_state_dict(before)
        ewc.strength = 3.0 if what == "assignment" else "auto"

    interrupt = Interrupt(run, of_c=of_c)
    steps = len(interrupt.places())
    for step in range(max(1, steps - 200), steps):
        reset()
        interrupt.at(step)
        largest = max(each.max().item() for each in ewc.fisher.values())
        allowed = [3.0] if what == "assignment" else []
        assert ewc.strength in [*allowed, pytest.approx(FACTOR / largest)], interrupt.place


class Ends(nn.Module):
    """Raises an error of PyTorch's own, or one of the user's, after Ctrl-C."""

    def __init__(self, end):
        super().__init__()
        self.body, self.end = make_model(), end

    def forward(self, x):
        if self.end is not None:
            try:
                raise KeyboardInterrupt
            finally:
                self.end()
        return self.body(x)


def of_the_user():
    raise OSError("the user's")


@pytest.mark.parametrize(
    ("end", "expected"),
    [(torch.autograd.forward_ad.exit_dual_level, KeyboardInterrupt), (of_the_user, OSError)],
)
def test_row_17_an_error_of_the_clean_up_gives_way_to_ctrl_c(end, expected):
    model = Ends(None)
    ewc = EWC(model, Classification())
    ewc.consolidate(make_task())
    model.end = end
    with unchanged(ewc, model), pytest.raises(expected):
        ewc.consolidate(make_task())


class Ending(Classification, takes_batches=True):
    """Raises an error of PyTorch's own after Ctrl-C, once, without a change that can be seen."""

    def __init__(self, ends):
        super().__init__()
        self.take = ends.pop  # C functions are not looked into

    def nll(self, outputs, targets):
        if self.take("end", False):
            try:
                raise KeyboardInterrupt
            finally:
                torch.autograd.forward_ad.exit_dual_level()
        return super().nll(outputs, targets)


def test_row_17_ctrl_c_while_a_verification_is_recalled():
    model, ends = make_model(), {}
    ewc = EWC(model, Ending(ends))
    ewc.consolidate(make_task())
    ends["end"] = True
    with unchanged(ewc, model), pytest.raises(KeyboardInterrupt):
        ewc.consolidate(make_task())


def test_row_17_a_mode_that_was_active_stays_so():
    ewc = EWC(make_model(), Classification())

    class Counting(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def batches():
        yield make_task()[0]
        torch.overrides._pop_mode()
        sys.exit(0)

    with unchanged(None, nn.Module()), Counting() as mode:
        with pytest.raises(SystemExit):
            ewc.consolidate(batches())
        before = mode.calls
        torch.ones(1) + 1
        assert mode.calls > before
