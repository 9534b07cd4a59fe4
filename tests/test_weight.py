"""`consolidate(weight=)`: how much a task counts."""

import pytest
import torch

from ewc import EWC, Classification, OnlineEWC
from tests import oracle
from tests.support.asserts import assert_close, raises, unchanged
from tests.support.tasks import make_model, make_task, shift, written_out

WEIGHTS = (0.25, 3.0, 1.0)


def consolidated(kind, **options):
    """An object after three tasks, and each task's weighted Fisher and anchor by the oracle."""
    model = make_model(dtype=torch.float64)
    ewc = kind(model, Classification(), **options)
    tasks = []
    for seed, weight in enumerate(WEIGHTS):
        shift(model, seed)
        task = [(x.double(), y) for x, y in make_task(seed)]
        fisher = {name: weight * one for name, one in oracle.fisher(model, task).items()}
        tasks.append((fisher, {n: p.detach().clone() for n, p in model.named_parameters()}))
        summary = ewc.consolidate(task, weight=weight)
        assert summary.weight == weight
        assert ("weight" in repr(summary).splitlines()[0]) == (weight != 1)
    shift(model, 9)
    return model, ewc, tasks


def test_the_penalty_is_the_weighted_sum():
    model, ewc, tasks = consolidated(EWC, strength=7.0)
    assert ewc().item() == pytest.approx(written_out(tasks, model, 7.0).item(), rel=1e-9)
    expected = {name: sum(fisher[name] for fisher, _ in tasks) for name in tasks[0][0]}
    assert_close(ewc.fisher, expected)
    other = EWC(model, Classification(), strength=7.0)
    other.load_state_dict(ewc.state_dict())
    assert other().item() == ewc().item()


def test_online():
    model, ewc, tasks = consolidated(OnlineEWC, decay=0.5, prior_precision=0.1)
    (first, _), (second, _), (third, anchor) = tasks
    fisher = {n: third[n] + 0.5 * (second[n] + 0.5 * first[n]) for n in first}
    assert_close(ewc.fisher, fisher)
    curvature = {name: 0.5 * one + 0.1 for name, one in fisher.items()}
    expected = written_out([(curvature, anchor)], model, ewc.strength)
    assert ewc().item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
def test_with_every_reduction_and_type(fisher_type):
    found = []
    for weight in (1.0, 0.5):
        ewc = EWC(make_model(), Classification(), fisher_type=fisher_type, reduction="sum")
        generator = torch.Generator().manual_seed(0)
        ewc.consolidate(make_task(), weight=weight, generator=generator)
        found.append(ewc.fisher)
    assert_close(found[1], {name: 0.5 * one for name, one in found[0].items()})


def test_one_is_no_weight():
    found = []
    for options in ({}, {"weight": 1}):
        ewc = EWC(make_model(), Classification())
        ewc.consolidate(make_task(), **options)
        found.append(ewc.fisher)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_weight_that_overflows():
    ewc = EWC(make_model(), Classification())
    with pytest.raises(ValueError, match=r"The Fisher must be finite.*weight"):
        ewc.consolidate(make_task(), weight=1e300)
    assert ewc.n_tasks == 0


def test_a_weight_that_underflows():
    model = make_model()
    ewc = EWC(model, Classification())
    with unchanged(ewc, model), raises(ValueError, "every parameter is zero", "weight is so small"):
        ewc.consolidate(make_task(), weight=1e-60)
