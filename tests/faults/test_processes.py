"""Row 46a: several processes, which consolidations do not sum over as yet.

No second process is needed: the group of the tests is one that only pretends to have more ranks.
"""

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from ewc import Classification
from tests._asserts import raises, unchanged
from tests._tasks import assert_close, explicit_fisher, make_model, make_task


@pytest.fixture
def world():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("given", [False, True])
def test_row_46a_several_ranks_are_refused(kind, given):
    model = make_model()
    group = torch.distributed.group.WORLD if given else None
    ewc = kind(model, Classification(), process_group=group)
    parts = ("runs in one process", "2 ranks", "process_group=torch.distributed.new_subgroups")
    with unchanged(ewc, model), raises(NotImplementedError, *parts):
        ewc.consolidate(make_task())


@pytest.mark.usefixtures("world")
def test_row_46a_a_group_of_one_rank_opts_out(kind):
    group, _ = torch.distributed.new_subgroups(group_size=1)
    model = make_model()
    ewc = kind(model, Classification(), process_group=group)
    ewc.consolidate(make_task())
    assert_close(ewc.fisher, explicit_fisher(model, make_task()))
