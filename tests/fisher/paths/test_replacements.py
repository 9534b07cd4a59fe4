"""Activation checkpointing is called plainly, in the thread of a collection alone."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import CheckpointFunction, checkpoint, checkpoint_sequential

from ewc import EWC
from ewc.fisher.paths.replacements import replaced
from tests import oracle
from tests.fisher.paths.models import Net
from tests.support.asserts import assert_close, unchanged
from tests.support.fisher import TYPES, data, double, holds, likelihood


def plain(net: Net, x: Tensor) -> Tensor:
    return net.last(net.first(x).tanh() + net.vector)


def block(net: Net, x: Tensor, *, reentrant: bool) -> Tensor:
    def run(x: Tensor) -> Tensor:
        return net.first(x).tanh() + net.vector

    h = checkpoint(run, x.clone().requires_grad_(), use_reentrant=reentrant)
    return checkpoint(net.last, h, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fisher_type", TYPES)
def test_a_checkpoint_is_the_function(fisher_type: str, reentrant: bool) -> None:
    batches = data(4)
    net = double(lambda: Net(lambda net, x: block(net, x, reentrant=reentrant)))
    ewc = EWC(net, likelihood("empirical"))
    assert set(ewc.consolidate(batches).paths.values()) == {"rule"}
    assert_close(ewc.fisher, oracle.fisher(double(lambda: Net(plain)), batches), 1e-9)
    if not reentrant:
        assert set(holds(net, batches, fisher_type).values()) == {"rule"}


def wrapped() -> nn.Module:
    return nn.Sequential(checkpoint_wrapper(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


def composed() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    composable(net[0])
    return net


class Segments(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(list(self), 2, x, use_reentrant=False)


def segments() -> nn.Module:
    return Segments(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("make", [wrapped, composed, segments])
def test_wrappers(make) -> None:
    torch.manual_seed(0)
    net = make().double()
    if make is composed:  # its state cannot be copied, as the oracle does
        torch.manual_seed(0)
        expected = oracle.fisher(segments().double(), data(4))
    else:
        expected = oracle.fisher(net, data(4))
    ewc = EWC(net, likelihood("empirical"))
    with unchanged(None, net):
        assert set(ewc.consolidate(data(4)).paths.values()) == {"rule"}
    assert_close(dict(zip(expected, ewc.fisher.values(), strict=True)), expected, 1e-9)


def originals() -> tuple[object, ...]:
    return (
        torch.autograd.function._is_setup_context_defined,
        checkpointing._checkpoint_without_reentrant_generator,
        vars(CheckpointFunction).get("apply"),
        vars(torch.autograd.Function).get("apply"),
    )


def test_the_replacements_end_with_the_last_context() -> None:
    before = originals()
    with replaced:
        with replaced:
            pass
        assert originals() != before
    assert originals() == before
    with pytest.raises(KeyboardInterrupt), replaced:
        raise KeyboardInterrupt
    assert originals() == before


def recomputations() -> int:
    """How often a checkpointed function is run for one forward and reverse pass."""
    runs = []
    for reentrant in (False, True):
        x = torch.ones(2, requires_grad=True)
        checkpoint(lambda x: runs.append(1) or x * x, x, use_reentrant=reentrant).sum().backward()
    return len(runs)


def test_another_thread_has_the_originals() -> None:
    found = []
    with replaced:
        thread = threading.Thread(target=lambda: found.append(recomputations()))
        thread.start()
        thread.join()
        assert recomputations() == 2
    assert found == [4]
    assert recomputations() == 4
