import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ewc import EWC, Classification, OnlineEWC
from tests._tasks import (
    CLASSES,
    INPUTS,
    as_task,
    make_ewc,
    make_model,
    make_task,
    same,
    same_state,
    shift,
)

KINDS = pytest.mark.parametrize("kind", [EWC, OnlineEWC])


def trained(kind=EWC, model=None, n_tasks=2, **options):
    model = make_model() if model is None else model
    ewc = kind(model, Classification(), **options)
    for seed in range(n_tasks):
        shift(model, seed)
        ewc.consolidate(make_task(seed))
    return model, ewc


def fresh(model, kind=EWC, **options):
    return kind(copy.deepcopy(model), Classification(), **options)


def add_output(model, rows=1):
    head = model[2]
    head.weight = nn.Parameter(torch.cat([head.weight.detach(), torch.ones(rows, 7)]))
    head.bias = nn.Parameter(torch.cat([head.bias.detach(), torch.ones(rows)]))


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def equal_objects(one, other):
    return (
        same_state(one, other.fisher, other.anchor)
        and one.n_tasks == other.n_tasks
        and torch.equal(one(), other())
    )


class TestForm:
    def test_keys(self):
        _, ewc = trained()
        state = ewc.state_dict()
        assert state["version"] == 1
        assert state["kind"] == "EWC"
        assert state["n_tasks"] == 2
        assert state["reduction"] == "mean"
        assert state["fisher_type"] == "empirical"
        assert state["parameters"] == list(ewc.fisher)
        assert same(state["fisher"], ewc.fisher)
        assert same(state["anchor"], ewc.anchor)
        assert set(state["free_rows"].values()) == {0}

    def test_online_keys(self):
        _, ewc = trained(OnlineEWC, decay=0.5, prior_precision=2.0)
        state = ewc.state_dict()
        assert (state["kind"], state["decay"], state["prior_precision"]) == ("OnlineEWC", 0.5, 2.0)

    def test_full_is_the_same_for_plain_tensors(self):
        _, ewc = trained()
        assert same(ewc.state_dict(full=True)["fisher"], ewc.state_dict()["fisher"])

    def test_fresh_object_writes_a_template(self):
        model, ewc = make_ewc()
        state = ewc.state_dict()
        assert state["n_tasks"] == 0
        assert same(state["anchor"], dict(model.state_dict()))
        assert not any(one.any() for one in state["fisher"].values())
        other = fresh(model)
        other.load_state_dict(state)
        assert other.n_tasks == 0
        assert not other.fisher
        assert other().item() == 0.0

    def test_loading_a_fresh_state_forgets(self):
        _, ewc = trained()
        state = make_ewc()[1].state_dict()
        ewc.load_state_dict(state)
        assert ewc.n_tasks == 0
        assert ewc().item() == 0.0

    @KINDS
    def test_round_trip(self, kind):
        model, ewc = trained(kind)
        shift(model, 7)
        other = fresh(model, kind)
        other.load_state_dict(through_file(ewc.state_dict()))
        assert equal_objects(other, ewc)

    def test_prior_by_name_round_trip(self):
        prior = {"0.bias": torch.rand(7), "2.weight": torch.rand(CLASSES, 7)}
        model, ewc = trained(OnlineEWC, prior_precision=prior)
        other = fresh(model, OnlineEWC, prior_precision=prior)
        other.load_state_dict(through_file(ewc.state_dict()))
        shift(model)
        assert other.n_tasks == 2
        with pytest.raises(ValueError, match=r"'prior_precision' is .* in the state"):
            fresh(model, OnlineEWC).load_state_dict(ewc.state_dict())

    @KINDS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_resumed_training_continues_bit_for_bit(self, kind, dtype):
        model, ewc = trained_in(kind, dtype)
        other_model = copy.deepcopy(model)
        other = kind(other_model, Classification())
        other.load_state_dict(through_file(ewc.state_dict()))
        for one_model, one in ((model, ewc), (other_model, other)):
            optimizer = torch.optim.SGD(one_model.parameters(), lr=0.1)
            for seed in range(2):
                one().backward()
                optimizer.step()
                one.consolidate(task_in(dtype, seed))
        assert equal_objects(other, ewc)

    def test_row_37_frozen_parameter_is_kept(self):
        model, ewc = trained()
        model[0].requires_grad_(False)
        other = fresh(model)
        other.load_state_dict(ewc.state_dict())
        assert equal_objects(other, ewc)

    def test_after_forget(self):
        model, ewc = trained()
        ewc.forget("0.weight")
        other = fresh(model)
        other.load_state_dict(ewc.state_dict())
        assert list(other.fisher) == list(ewc.fisher)
        assert equal_objects(other, ewc)

    def test_loads_into_an_object_in_use(self):
        model, ewc = trained()
        state = ewc.state_dict()
        shift(model, 5)
        expected = ewc().item()
        ewc.consolidate(make_task(5))
        ewc.load_state_dict(state)
        assert ewc.n_tasks == 2
        assert ewc().item() == expected

    def test_never_narrowed(self):
        model, ewc = trained(model=make_model(dtype=torch.float64), n_tasks=0)
        ewc.consolidate(task_in(torch.float64, 0))
        other = EWC(copy.deepcopy(model).float(), Classification())
        other.load_state_dict(ewc.state_dict())
        assert all(one.dtype is torch.float64 for one in other.fisher.values())
        assert other().dtype is torch.float32

    def test_a_scalar_parameter(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.tensor(2.0))

            def forward(self, x):
                return self.scale * x[:, :CLASSES]

        model, ewc = make_ewc(Scaled())
        other = EWC(model, Classification())
        other.load_state_dict(ewc.state_dict())
        assert not other.fisher
        ewc.consolidate(make_task())
        other.load_state_dict(ewc.state_dict())
        assert same(other.fisher, ewc.fisher)


def task_in(dtype, seed):
    return [(x.to(dtype), y) for x, y in make_task(seed)]


def trained_in(kind, dtype):
    model = make_model(dtype=dtype)
    ewc = kind(model, Classification())
    for seed in range(2):
        shift(model, seed)
        ewc.consolidate(task_in(dtype, seed))
    shift(model, 2)
    return model, ewc


def drop(*path):
    def apply(state):
        *owners, last = path
        for owner in owners:
            state = state[owner]
        del state[last]

    return apply


def put(value, *path):
    def apply(state):
        *owners, last = path
        for owner in owners:
            state = state[owner]
        state[last] = value

    return apply


def rename(state):
    for key in ("fisher", "anchor", "constant", "free_rows"):
        state[key]["0.wieght"] = state[key].pop("0.weight")
    state["parameters"][0] = "0.wieght"


def negative(state):
    state["fisher"]["0.bias"][2] = -1.0


def not_a_number(state):
    state["fisher"]["0.bias"][2] = float("nan")


class TestRow28:
    """What must not load, and leaves everything as it was."""

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (drop("fisher"), "missing key 'fisher'"),
            (drop("n_tasks"), "missing key 'n_tasks'"),
            (drop("fisher", "0.bias"), r"missing fisher\['0\.bias'\]"),
            (drop("anchor", "0.bias"), r"missing anchor\['0\.bias'\]"),
            (drop("constant", "0.bias"), r"missing constant\['0\.bias'\]"),
            (put(torch.zeros(3), "fisher", "other"), r"unexpected fisher\['other'\]"),
            (put(3, "other"), "unexpected key 'other'"),
            (rename, r"unexpected '0\.wieght'.*nearest: '0\.weight'"),
            (put(torch.zeros(8), "fisher", "0.bias"), r"shape \(8,\), the parameter \(7,\)"),
            (put(torch.zeros(6), "anchor", "0.bias"), r"shape \(7,\), its anchor \(6,\)"),
            (put(torch.zeros(7, 1), "fisher", "0.bias"), r"shape \(7, 1\), the parameter \(7,\)"),
            (negative, r"fisher\['0\.bias'\] must be >= 0.*-1"),
            (not_a_number, r"fisher\['0\.bias'\] must be finite"),
            (put(torch.zeros(7).half(), "fisher", "0.bias"), "float16"),
            (put(torch.zeros(7).cfloat(), "anchor", "0.bias"), "complex64"),
            (put([0.0] * 7, "fisher", "0.bias"), "must be a tensor; found list"),
            (put("x", "constant", "0.bias"), "must be a finite float"),
            (put(float("inf"), "constant", "0.bias"), "must be a finite float"),
            (put(8, "free_rows", "0.bias"), r"free_rows\['0\.bias'\].*found 8"),
            (put(2, "version"), "version' is 2.*later release"),
            (put("1", "version"), "version' is '1'"),
            (put(-1, "n_tasks"), "'n_tasks' must be an integer >= 0"),
            (put("OnlineEWC", "kind"), "'kind' is 'OnlineEWC' in the state and 'EWC' in this"),
            (put("sum", "reduction"), "'reduction' is 'sum' in the state"),
            (put("mc", "fisher_type"), "'fisher_type' is 'mc' in the state"),
            (put([], "fisher"), "'fisher' must be a dict by name; found list"),
            (put("abc", "parameters"), "'parameters' must be a list of names"),
        ],
    )
    def test_row_28_one_thing_wrong(self, change, what):
        model, ewc = trained()
        state = ewc.state_dict()
        change(state)
        self.assert_refused(model, ewc, state, ValueError, what)

    @pytest.mark.parametrize("state", [None, 3, [], "state", torch.zeros(2)])
    def test_row_28_not_a_dict(self, state):
        model, ewc = trained()
        self.assert_refused(model, ewc, state, TypeError, "must be a dict")

    def test_row_28_all_at_once(self):
        _, ewc = trained()
        state = ewc.state_dict()
        negative(state)
        state["version"] = 7
        del state["fisher"]["0.weight"]
        state["anchor"]["2.bias"] = torch.zeros(9)
        with pytest.raises(ValueError, match="nothing was loaded") as error:
            ewc.load_state_dict(state)
        for part in ("'0.bias'", "version", "'0.weight'", "'2.bias'"):
            assert part in str(error.value)

    def test_row_28_an_empty_dict(self):
        model, ewc = trained()
        self.assert_refused(model, ewc, {}, ValueError, "missing key 'version'")

    @pytest.mark.parametrize("options", [{"decay": 0.5}, {"prior_precision": 1.0}])
    def test_row_28_another_online_configuration(self, options):
        _, ewc = trained(OnlineEWC)
        with pytest.raises(ValueError, match=f"{next(iter(options))!r} is"):
            OnlineEWC(make_model(), Classification(), **options).load_state_dict(ewc.state_dict())

    def test_row_28_another_class(self):
        model, ewc = trained(OnlineEWC)
        with pytest.raises(ValueError, match="'kind' is 'OnlineEWC'"):
            fresh(model).load_state_dict(ewc.state_dict())

    @staticmethod
    def assert_refused(model, ewc, state, error, what):
        shift(model, 4)
        fisher, anchor = as_task(ewc)
        penalty, weights = ewc().item(), copy.deepcopy(dict(model.state_dict()))
        with pytest.raises(error, match=what):
            ewc.load_state_dict(state)
        assert same_state(ewc, fisher, anchor)
        assert ewc.n_tasks == 2
        assert ewc().item() == penalty
        assert same(dict(model.state_dict()), weights)


class TestRow28a:
    """A model that has grown since."""

    def test_row_28a_grown_head_and_new_module(self):
        model, ewc = trained()
        state = ewc.state_dict()
        add_output(model, 2)
        model.append(nn.Linear(CLASSES + 2, CLASSES))
        other = fresh(model)
        with pytest.warns(UserWarning, match="free until the next") as caught:
            other.load_state_dict(state)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert "'2.weight' has 5 rows, the state 3" in str(caught[0].message)
        assert "'3.weight' is not in the state" in str(caught[0].message)
        assert other().item() == pytest.approx(ewc().item())
        assert same(other.fisher, ewc.fisher)
        other.consolidate(make_task(3))
        assert other.fisher["2.weight"].shape == (CLASSES + 2, 7)

    def test_row_28a_no_name_matches(self):
        _, ewc = trained()
        other = EWC(nn.ModuleDict({"body": nn.Linear(2, 2)}), Classification())
        with pytest.raises(ValueError, match=r"none of its parameters is in the model.*'body"):
            other.load_state_dict(ewc.state_dict())

    @KINDS
    def test_row_35_37_saved_after_the_model_grew(self, kind):
        options = {"prior_precision": 1.0} if kind is OnlineEWC else {}
        model, ewc = trained(kind, **options)
        add_output(model)
        model.append(nn.Linear(CLASSES + 1, CLASSES))
        shift(model, 5)
        state = ewc.state_dict()
        assert state["fisher"]["2.weight"].shape == model[2].weight.shape
        assert state["free_rows"] == {
            **dict.fromkeys(state["parameters"], 0),
            "2.weight": 1,
            "2.bias": 1,
            "3.weight": CLASSES,
            "3.bias": CLASSES,
        }
        other = fresh(model, kind, **options)
        other.load_state_dict(through_file(state))
        assert equal_objects(other, ewc)
        ewc.consolidate(make_task(6))
        other.consolidate(make_task(6))
        assert equal_objects(other, ewc)


class TestRow29:
    """`torch.distributed.checkpoint`, which reads into a fresh object's own state."""

    @staticmethod
    def save_and_load(ewc, other, path):
        dcp.save({"ewc": ewc}, checkpoint_id=path, no_dist=True)
        dcp.load({"ewc": other}, checkpoint_id=path, no_dist=True)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("n_tasks", [0, 2])
    @KINDS
    def test_row_29_restores_all(self, kind, n_tasks, tmp_path):
        options = {} if kind is EWC else {"prior_precision": {"0.bias": torch.rand(7)}}
        model, ewc = trained(kind, n_tasks=n_tasks, **options)
        shift(model, 5)
        other = fresh(model, kind, **options)
        self.save_and_load(ewc, other, tmp_path)
        assert equal_objects(other, ewc)
        assert other.n_tasks == n_tasks

    @pytest.mark.filterwarnings("ignore")
    def test_row_29_after_the_model_grew(self, tmp_path):
        model, ewc = trained()
        add_output(model)
        model.append(nn.Linear(CLASSES + 1, CLASSES))
        other = fresh(model)
        self.save_and_load(ewc, other, tmp_path)
        assert equal_objects(other, ewc)

    @pytest.mark.filterwarnings("ignore")
    def test_row_29_never_silently_nothing(self, tmp_path):
        model, ewc = trained()
        # The template of a fresh object has no place for a parameter that is frozen now.
        model[0].requires_grad_(False)
        other = fresh(model)
        with pytest.raises(ValueError, match=r"missing fisher\['0\.weight'\]"):
            self.save_and_load(ewc, other, tmp_path)


class TestRow30:
    def test_row_30_returned_state(self):
        model, ewc = trained()
        shift(model, 5)
        fisher, anchor = as_task(ewc)
        expected = ewc().item()
        self.spoil(ewc.state_dict())
        assert same_state(ewc, fisher, anchor)
        assert ewc().item() == expected

    def test_row_30_loaded_state(self):
        model, ewc = trained()
        state = ewc.state_dict()
        other = fresh(model)
        other.load_state_dict(state)
        self.spoil(state)
        assert equal_objects(other, ewc)

    def test_row_30_no_view_of_a_larger_storage(self):
        _, ewc = trained()
        state = ewc.state_dict()
        for tensor in (*state["fisher"].values(), *state["anchor"].values()):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()

    @staticmethod
    def spoil(state):
        for key in ("fisher", "anchor"):
            for tensor in state[key].values():
                tensor.fill_(-7.0)
            state[key].clear()
        state["constant"].clear()
        state["parameters"].clear()


class TestRow31:
    def test_row_31_any_wrapper(self):
        model = make_model()
        wrapped = {
            "plain": model,
            "compiled": torch.compile(copy.deepcopy(model), backend="eager"),
            "data parallel": nn.DataParallel(copy.deepcopy(model)),
            "inside": nn.Sequential(
                torch.compile(copy.deepcopy(model[0]), backend="eager"),
                model[1],
                copy.deepcopy(model[2]),
            ),
        }
        objects = {name: EWC(one, Classification()) for name, one in wrapped.items()}
        for ewc in objects.values():
            ewc.consolidate(make_task())
        for source in objects.values():
            for target in objects.values():
                target.load_state_dict(source.state_dict())
                assert list(target.fisher) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_row_32_another_device():
    model, ewc = trained()
    other = EWC(copy.deepcopy(model).cuda(), Classification())
    other.load_state_dict(ewc.state_dict())
    assert all(one.is_cuda for one in other.fisher.values())
    assert other().item() == pytest.approx(ewc().item(), rel=1e-5)


def test_row_32_state_on_another_device_than_the_state_dicts():
    model, ewc = trained(model=make_model(dtype=torch.float64), n_tasks=0)
    ewc.consolidate(task_in(torch.float64, 0))
    state = ewc.state_dict()
    other = fresh(model)
    other.load_state_dict(state)
    parameters = dict(model.named_parameters())
    assert all(one.device == parameters[name].device for name, one in other.fisher.items())


def test_load_keeps_the_strength():
    model, ewc = trained(strength=5.0)
    other = fresh(model, strength=2.0)
    other.load_state_dict(ewc.state_dict())
    assert other.strength == 2.0


def test_chosen_names_may_be_fewer_when_loading():
    model, ewc = trained()
    other = fresh(model, parameters=["2.weight"])
    other.load_state_dict(ewc.state_dict())
    # Known from before, and so still counted; only what is chosen is collected.
    assert list(other.fisher) == list(ewc.fisher)
    other.consolidate(make_task(INPUTS))
    assert torch.equal(other.fisher["0.weight"], ewc.fisher["0.weight"])
    assert not torch.equal(other.fisher["2.weight"], ewc.fisher["2.weight"])
