import sys
import types

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from ewc.model.names import (
    find,
    in_order,
    is_parametrized,
    named_parameters,
    nearest,
    unwrap,
)
from tests.support import groups


class TestUnwrap:
    def test_plain(self, model):
        assert unwrap(model) is model

    def test_compiled(self, model):
        assert unwrap(torch.compile(model, backend="eager")) is model

    def test_data_parallel_around_compiled(self, model):
        assert unwrap(nn.DataParallel(torch.compile(model, backend="eager"))) is model

    def test_distributed(self, model, tmp_path):
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        try:
            wrapped = nn.parallel.DistributedDataParallel(model)
            assert unwrap(wrapped) is model
            assert list(named_parameters(wrapped)) == list(dict(model.named_parameters()))
        finally:
            groups.destroy()

    def test_checkpoint_wrapper(self, model):
        assert unwrap(checkpoint_wrapper(model)) is model

    def test_fabric(self, model, monkeypatch):
        # Fabric itself is not imported, neither here nor there: a class in its place will do.
        class _FabricModule(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self._forward_module = nn.DataParallel(inner)
                self._original_module = inner

        home = types.ModuleType("lightning.fabric.wrappers")
        home._FabricModule = _FabricModule
        monkeypatch.setitem(sys.modules, home.__name__, home)
        assert unwrap(_FabricModule(model)) is model

    def test_a_child_of_a_wrappers_name_is_no_wrapper(self):
        model = nn.Module()
        model.module = nn.Linear(2, 2)
        assert unwrap(model) is model
        assert list(named_parameters(model)) == ["module.weight", "module.bias"]


class TestNames:
    def test_are_those_of_torch(self, model):
        assert named_parameters(model) == dict(model.named_parameters())

    def test_wrappers_inside_the_tree(self, model):
        names = list(named_parameters(model))
        model[0] = checkpoint_wrapper(model[0])
        model[2] = torch.compile(model[2], backend="eager")
        assert list(named_parameters(model)) == names
        assert find(model, "2.weight") is model[2]._orig_mod.weight

    def test_tied_parameters_once(self, tied):
        assert list(named_parameters(tied)) == ["encoder.weight", "encoder.bias", "decoder.bias"]
        assert find(tied, "decoder.weight") is tied.encoder.weight

    def test_shared_module_once(self):
        shared = nn.Linear(2, 2)
        model = nn.Sequential(shared, nn.ReLU(), shared)
        assert list(named_parameters(model)) == ["0.weight", "0.bias"]

    def test_a_module_that_contains_itself(self):
        model = nn.Sequential(nn.Linear(2, 2))
        model.append(model)
        assert list(named_parameters(model)) == ["0.weight", "0.bias"]

    def test_order(self, model):
        names = ["gone", "2.bias", "0.weight", "2.bias"]
        assert in_order(model, names) == ["0.weight", "2.bias", "gone"]

    @pytest.mark.parametrize("name", ["3.weight", "0.wieght", "0", "", "0.weight.x", "1.weight"])
    def test_find_nothing(self, model, name):
        assert find(model, name) is None

    def test_parametrized(self, model):
        assert not is_parametrized(model, "0.weight")
        parametrizations.weight_norm(model[0])
        assert find(model, "0.weight") is None
        assert is_parametrized(model, "0.weight")
        assert not is_parametrized(model, "2.weight")

    def test_nearest(self):
        assert "'0.weight'" in nearest("0.wieght", ["0.weight", "0.bias"])
        assert "'a'" in nearest("utterly", ["a", "b"])
        assert nearest("x", []) == "there are none"
