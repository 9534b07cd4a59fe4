"""Rows 46a, 46d, 46g: a process that works for itself, an old PyTorch, wrappers that are refused.

The other rows are in tests/distributed.

No second process is needed: the world is one that only pretends to have more ranks.
"""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.torch_version import TorchVersion

from ewc import Classification
from tests import oracle
from tests.support.asserts import assert_close, raises
from tests.support.tasks import make, make_model, make_task


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


@pytest.mark.filterwarnings("ignore:DTensor random operators may not")  # PyTorch 2.6
@pytest.mark.usefixtures("world")
def test_row_46d_sharded_parameters_on_an_old_pytorch(kind, monkeypatch):
    """In every way that parameters are sharded: tests/processes/test_layout.py."""
    group, _ = torch.distributed.new_subgroups(group_size=1)  # the other rank never comes
    model, ewc = make(kind, process_group=group)
    state = ewc.state_dict()
    weight, mesh = model[0].weight.detach(), init_device_mesh("cpu", (2,))
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    model[0].weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    for call in (
        lambda: kind(model, Classification()),
        ewc,
        lambda: ewc.consolidate(make_task()),
        lambda: ewc.load_state_dict(state),
    ):
        with raises(RuntimeError, "PyTorch must be 2.12 or later", "found a DTensor", "2.11.0"):
            call()


def test_row_46g_wrappers_that_are_refused(kind):
    """All of them: tests/model/test_wrappers.py."""
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = make_model()
    with raises(TypeError, "a DeepSpeed engine (DeepSpeedEngine)", "Fix: pass engine.module"):
        kind(engine, Classification())
    kind(engine.module, Classification()).consolidate(make_task())
