"""Row 46a: one of several processes that works for itself. The other rows are in tests/distributed.

No second process is needed: the world is one that only pretends to have more ranks.
"""

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from ewc import Classification
from tests import oracle
from tests.support.asserts import assert_close
from tests.support.tasks import make_model, make_task


@pytest.fixture
def world():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("world")
def test_row_46a_a_group_of_one_rank_opts_out(kind):
    group, _ = torch.distributed.new_subgroups(group_size=1)
    model = make_model()
    ewc = kind(model, Classification(), process_group=group)
    ewc.consolidate(make_task())
    assert_close(ewc.fisher, oracle.fisher(model, make_task()))
