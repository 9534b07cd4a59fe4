"""The guard alone; rows 17d to 21 of `tests/faults/` test it through consolidations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from ewc.model.guard import Guard
from tests.support.asserts import unchanged


@contextmanager
def guarded(model: nn.Module) -> Iterator[Guard]:
    """What happens inside is to leave no trace."""
    with unchanged(None, model):
        guard = Guard(model)
        guard.prepare()
        yield guard
        guard.leave()


def test_eval_mode_and_no_gradients_inside(model):
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with guarded(model):
        assert not any(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_a_run_are_dropped_by_restore(model):
    with guarded(model) as guard:
        model(torch.ones(2, 5)).sum().backward()
        guard.restore()
        assert all(parameter.grad is None for parameter in model.parameters())


def test_attributes_that_a_run_adds_or_replaces(model):
    model.count = 0
    with guarded(model) as guard:
        for restore in (guard.restore, lambda: None):  # the second time it is left to the exit
            model.count = 1
            model.added = 2
            model[0].register_buffer("cache", torch.zeros(3))
            model[2] = nn.Identity()
            restore()
    assert not hasattr(model, "added")


def test_writes_with_a_new_version_are_undone_by_restore():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Embedding(4, 3, max_norm=0.1))
    with guarded(model) as guard:
        model[0].running_mean.add_(1.0)
        model[1](torch.tensor([1]))
        assert model[1].weight[1].norm() <= 0.1 + 1e-6
        guard.restore()
        assert model[1].weight[1].norm() > 0.1 + 1e-6
        assert not model[0].running_mean.any()
        model[1](torch.tensor([1]))  # what the exit restores


def test_statistics_that_are_written_without_a_new_version_are_restored_on_exit():
    model = nn.BatchNorm1d(3)
    version = model.running_mean._version
    with guarded(model):
        F.batch_norm(torch.eye(3) + 1, model.running_mean, model.running_var, training=True)
        assert model.running_mean.any()
        assert model.running_mean._version == version


def test_hooks_and_requires_grad_that_a_run_changes():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].register_forward_hook(lambda module, args, output: None)
    model[0].weight.register_hook(lambda gradient: gradient)
    with guarded(model):
        model[0]._forward_hooks.clear()
        model[1].register_forward_pre_hook(lambda module, args: None, prepend=True)
        model[1].register_full_backward_hook(lambda module, into, out: None)
        model[1].weight.register_hook(lambda gradient: gradient)
        model[1].bias.requires_grad_(False)


def test_leaving_twice_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with guarded(model) as guard:
        model[0].running_mean.add_(1.0)
        guard.leave()
