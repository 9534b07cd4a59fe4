"""The Fisher alone: what one consolidation of a fresh object would hold."""

import inspect

import pytest
import torch
from torch import nn

from ewc import EWC, Classification, InvalidBatch, ZeroFisherWarning, diagonal_fisher
from tests import oracle
from tests.support.asserts import assert_close, raises, unchanged
from tests.support.tasks import CLASSES, make_model, make_task, same


def double(task):
    return [(x.double(), y) for x, y in task]


def test_equals_the_oracle():
    model, task = make_model(dtype=torch.float64), double(make_task(batches=3))
    with unchanged(None, model):
        found = diagonal_fisher(model, task, Classification())
    assert_close(found, oracle.fisher(model, task))


def test_the_exact_one_equals_the_oracle():
    model, (batch, *_) = make_model(dtype=torch.float64), double(make_task())
    found = diagonal_fisher(model, [batch], Classification(), fisher_type="exact")

    def terms(network, n):
        log_p = network(batch[0][n : n + 1]).log_softmax(1)[0]
        return log_p.detach().mul(0.5).exp() * log_p

    expected = oracle.squares(model, terms, len(batch[0]))
    assert_close(found, {name: one / len(batch[0]) for name, one in expected.items()})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"parameters": ["2.bias", "0.weight"]},
        {"forward": lambda model, batch: 2 * model(batch[0])},
        {"fisher_type": "mc"},
        {"reduction": "sum"},
        {"max_samples": 3},
        {"max_samples": 3, "reduction": "sum", "dataset_size": 50},
    ],
    ids=lambda options: ", ".join(options) or "none",
)
def test_is_what_an_object_holds(options):
    model, task = make_model(), make_task()
    found = diagonal_fisher(
        model, task, Classification(), generator=torch.Generator().manual_seed(3), **options
    )
    size = options.pop("dataset_size", None)
    ewc = EWC(model, Classification(), **options)
    ewc.consolidate(task, dataset_size=size, generator=torch.Generator().manual_seed(3))
    assert same(found, ewc.fisher)


def test_takes_the_options_of_both():
    own = inspect.signature(diagonal_fisher).parameters
    others = {**inspect.signature(EWC).parameters, **inspect.signature(EWC.consolidate).parameters}
    assert set(own) == set(others) - {"self", "strength", "weight"}
    for name, one in own.items():
        if name not in ("model", "batches", "likelihood"):
            assert (one.kind, one.default) == (one.KEYWORD_ONLY, others[name].default)


def test_frozen_parameters_and_the_caller_s_gradients():
    model = make_model()
    model[0].requires_grad_(False)
    model[2].bias.grad = torch.ones(CLASSES)
    with unchanged(None, model), torch.no_grad():
        found = diagonal_fisher(model, make_task(), Classification())
    assert list(found) == ["2.weight", "2.bias"]
    assert not any(one.requires_grad for one in found.values())


def fitted(model, batch):
    """Outputs that leave no doubt about the targets."""
    return model(batch[0]) + 1e4 * torch.nn.functional.one_hot(batch[1], CLASSES)


def test_the_same_checks():
    model = make_model()
    task = make_task()
    with unchanged(None, model):
        with raises(ValueError, "fisher_type must be one of"):
            diagonal_fisher(model, task, Classification(), fisher_type="emprical")
        with raises(TypeError, "likelihood must be"):
            diagonal_fisher(model, task, nn.CrossEntropyLoss())
        with raises(ValueError, "at least one sample"):
            diagonal_fisher(model, [], Classification())
        with raises(InvalidBatch, "batch 0"):
            diagonal_fisher(model, [(task[0][0], task[0][1] + 7)], Classification())
        with raises(ValueError, "Fisher of every parameter is zero"):
            diagonal_fisher(model, task, Classification(), forward=fitted)
        with raises(ValueError, "'0.wieght' (nearest: '0.weight'"):
            diagonal_fisher(model, task, Classification(), parameters=["0.wieght"])


def test_warnings_are_for_the_caller():
    model = make_model()
    with torch.no_grad():
        model[2].weight.zero_()
    with pytest.warns(ZeroFisherWarning, match="'0.weight'") as caught:
        diagonal_fisher(model, make_task(), Classification())
    assert [one.filename for one in caught] == [__file__]
