import sys
import types

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from ewc.model.names import (
    Live,
    find,
    in_order,
    is_parametrized,
    named_parameters,
    nearest,
    select,
    unwrap,
)
from tests._tasks import make_model


@pytest.fixture
def model():
    return make_model()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight


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
            torch.distributed.destroy_process_group()

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

    def test_tied_parameters_once(self):
        tied = Tied()
        assert list(named_parameters(tied)) == ["encoder.weight", "encoder.bias", "decoder.bias"]
        assert find(tied, "decoder.weight") is tied.encoder.weight

    def test_shared_module_once(self):
        shared = nn.Linear(2, 2)
        model = nn.Sequential(shared, nn.ReLU(), shared)
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


class TestSelect:
    def test_names_in_canonical_order_once(self, model):
        assert select(model, ["2.bias", "0.weight", "2.bias"]) == ("0.weight", "2.bias")

    def test_pairs(self, model):
        assert select(model, model[2].named_parameters(prefix="2")) == ("2.weight", "2.bias")

    def test_pairs_of_a_wrapper(self, model):
        wrapped = torch.compile(model, backend="eager")
        assert all(name.startswith("_orig_mod.") for name, _ in wrapped.named_parameters())
        expected = tuple(named_parameters(model))
        assert select(wrapped, wrapped.named_parameters()) == expected
        assert select(wrapped, [name for name, _ in wrapped.named_parameters()]) == expected
        assert select(model, wrapped.named_parameters()) == expected

    def test_tied_name_is_the_canonical_one(self):
        assert select(Tied(), ["decoder.weight"]) == ("encoder.weight",)
        tied = Tied()
        assert select(tied, [("decoder.weight", tied.decoder.weight)]) == ("encoder.weight",)

    def test_unknown_name_shows_the_nearest(self, model):
        with pytest.raises(ValueError, match=r"'0\.wieght'.*'0\.weight'"):
            select(model, ["0.wieght"])

    def test_all_that_is_wrong_at_once(self, model):
        model[0].bias.requires_grad_(False)
        other = nn.Parameter(torch.zeros(3))
        with pytest.raises(ValueError, match="named 'x'") as error:
            select(model, ["x", "0.bias", ("mine", other), ("0.weight", model[2].weight)])
        for part in ("'0.bias' is frozen", "'mine' is paired with a tensor", "named '2.weight'"):
            assert part in str(error.value)

    @pytest.mark.parametrize("wrong", ["0.weight", b"0.weight", 3])
    def test_not_an_iterable_of_names(self, model, wrong):
        with pytest.raises(TypeError, match="iterable of names"):
            select(model, wrong)

    @pytest.mark.parametrize("item", [3, ("0.weight",), ("0.weight", 3), (3, torch.zeros(2))])
    def test_wrong_item(self, model, item):
        with pytest.raises(TypeError, match="a name or a"):
            select(model, [item])

    def test_bare_parameters_are_refused(self, model):
        with pytest.raises(TypeError, match="named_parameters"):
            select(model, model.parameters())


class TestLive:
    @pytest.fixture
    def live(self, model):
        return Live(model, named_parameters(model))

    def test_holds_while_values_change(self, model, live):
        assert live.parameters == list(model.parameters())
        with torch.no_grad():
            model[0].weight.add_(1.0)
        model[0].weight.requires_grad_(False)
        model.eval()
        assert live.holds()

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())),
            lambda m: m.__setitem__(0, nn.Linear(5, 7)),
            lambda m: m.__delitem__(0),
            lambda m: m.__setitem__(0, checkpoint_wrapper(m[0])),
            lambda m: delattr(m[0], "weight"),
            lambda m: parametrizations.weight_norm(m[0]),
            lambda m: m.double(),
            lambda m: setattr(m[0].weight, "data", torch.zeros(9, 5)),
        ],
        ids=["parameter", "module", "gone", "wrapped", "deleted", "parametrized", "dtype", "shape"],
    )
    def test_notices(self, model, live, change):
        change(model)
        assert not live.holds()

    def test_notices_a_replaced_inner_module(self):
        model = nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(2, 2))))
        live = Live(model, named_parameters(model))
        assert live.holds()
        model[0]._checkpoint_wrapped_module[0] = nn.Linear(2, 2)
        assert not live.holds()

    def test_refuses_a_name_with_a_dot_of_its_own(self):
        model = nn.Module()
        model._modules["a.b"] = nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"without a dot; found no way to 'a\.b\.weight'"):
            Live(model, named_parameters(model))
