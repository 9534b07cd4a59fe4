"""Rows 42 and 43: memory that stays, and objects that are copied.

`docs/benchmarks/long_runs.py` runs longer, and measures the memory of the whole process.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from ewc import EWC, Classification, OnlineEWC
from tests.support.tasks import CLASSES, INPUTS, make, make_model, make_task, shift


def tensors():
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def test_row_42_a_thousand_penalties(kind):
    model, ewc = make(kind)
    ewc().backward()
    model.zero_grad(set_to_none=False)
    before = tensors()
    for _ in range(1000):
        model.zero_grad(set_to_none=False)
        ewc().backward()
        ewc()
    assert tensors() <= before + 1


@pytest.mark.slow
def test_row_42_a_thousand_consolidations(kind):
    ewc = kind(nn.Linear(INPUTS, CLASSES), Classification())
    task = make_task(batches=1, size=1)
    for _ in range(3):
        ewc.consolidate(task)
    before = tensors()
    size = len(pickle.dumps(ewc))
    for _ in range(1000):
        ewc.consolidate(task)
    assert tensors() <= before + 1
    assert len(pickle.dumps(ewc)) <= size + 8  # a counter grows
    assert ewc.n_tasks == 1003


def test_row_42_failed_consolidations_leave_nothing_behind(kind):
    _, ewc = make(kind)
    wrong = [*make_task(), (torch.zeros(2, INPUTS), torch.tensor([0, CLASSES]))]
    for count in range(13):
        if count == 3:
            before = tensors()
        with pytest.raises(ValueError, match="label"):
            ewc.consolidate(wrong)
    assert tensors() <= before + 1


def test_row_42_no_cycle_keeps_the_model(kind):
    model, ewc = make(kind)
    ewc().backward()
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model, ewc
        assert gone() is None
    finally:
        gc.enable()


@pytest.fixture
def trained(kind):
    return make(kind, make_model(), n_tasks=2, strength=5.0)


def test_row_43_deepcopy(trained):
    model, ewc = trained
    other = copy.deepcopy(ewc)
    assert torch.equal(other(), ewc())
    expected = ewc().item()
    shift(model, 5)
    assert other().item() == expected
    other.consolidate(make_task(3))
    assert ewc.n_tasks == 2


def test_row_43_deepcopy_with_its_model(trained):
    model, ewc = trained
    together = copy.deepcopy({"ewc": ewc, "model": model})
    shift(together["model"], 5)
    assert together["ewc"]().item() != ewc().item()
    together["ewc"]().backward()
    assert together["model"][0].weight.grad is not None


def test_row_43_pickle(trained):
    _, ewc = trained
    other = pickle.loads(pickle.dumps(ewc))
    assert torch.equal(other(), ewc())
    assert other.n_tasks == ewc.n_tasks


def test_row_43a_process_group(trained):
    _, ewc = trained
    ewc._process_group = group = lambda: None  # can be neither copied nor pickled
    assert copy.deepcopy(ewc)._process_group is group
    assert pickle.loads(pickle.dumps(ewc))._process_group is None
    assert ewc._process_group is group


def _penalties_in_another_process(objects, queue):
    queue.put([ewc().item() for ewc in objects])


def test_row_43_spawn():
    # One process for both: starting it is what takes time.

    objects = [make(kind, n_tasks=2)[1] for kind in (EWC, OnlineEWC)]
    context = mp.get_context("spawn")
    queue = context.Queue()
    with torch.no_grad():
        child = context.Process(target=_penalties_in_another_process, args=(objects, queue))
        child.start()
    assert queue.get(timeout=120) == [ewc().item() for ewc in objects]
    child.join()
