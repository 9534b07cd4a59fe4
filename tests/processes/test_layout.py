"""Sharded parameters are refused where PyTorch is too old for them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.torch_version import TorchVersion

from ewc import EWC, Classification, OnlineEWC
from tests.support import groups
from tests.support.asserts import raises
from tests.support.tasks import make_model, make_task, shift
from tests.support.versions import SHARDS

pytestmark = pytest.mark.filterwarnings("ignore:DTensor random operators may not")  # PyTorch 2.6
PARTS = ("PyTorch must be 2.12 or later for sharded parameters", "PyTorch 2.", "torch>=2.12")


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    groups.destroy()


@pytest.fixture(params=["as it is", "2.11.0"])
def old(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A version on which they are refused."""
    version: str = request.param
    if version != "as it is":
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    elif SHARDS:
        pytest.skip("they are supported on the PyTorch that is installed")
    return str(torch.__version__)


def by_hand(placement: Any) -> Callable[[nn.Module], object]:
    def shard(model: nn.Module) -> None:
        whole = model[2].bias.detach()
        model[2].bias = nn.Parameter(distribute_tensor(whole, mesh(), [placement]))

    return shard


def mesh() -> Any:
    return init_device_mesh("cpu", (1,))


HOW: dict[str, Callable[[nn.Module], object]] = {
    "fully_shard": lambda model: fully_shard(model, mesh=mesh()),
    "fully_shard of a layer": lambda model: fully_shard(model[0], mesh=mesh()),
    "tensor parallel": lambda model: parallelize_module(model, mesh(), {"0": ColwiseParallel()}),
    "by hand": by_hand(Shard(0)),
    "replicated": by_hand(Replicate()),
}


@pytest.mark.parametrize(
    ("version", "is_supported"),
    [
        ("2.6.1+cu124", False),
        ("2.11.0a0+git1234567", False),
        ("2.12.0", True),
        ("2.12.0.dev20260401", True),
        ("2.15.0+cu130", True),
        ("3.0.0", True),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str, is_supported: bool) -> None:
    model = make_model()
    by_hand(Shard(0))(model)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    if is_supported:
        EWC(model, Classification())
    else:
        with raises(RuntimeError, *PARTS, version):
            EWC(model, Classification())


@pytest.mark.parametrize("how", HOW)
def test_at_construction(how: str, old: str) -> None:
    model = make_model()
    HOW[how](model)
    for kind in (EWC, OnlineEWC):
        for parameters in (None, ["2.weight"]):
            with raises(RuntimeError, *PARTS, old):
                kind(model, Classification(), parameters=parameters)


@pytest.mark.parametrize("n_tasks", [0, 2])
@pytest.mark.parametrize("how", HOW)
def test_when_sharded_after_construction(how: str, n_tasks: int, old: str) -> None:
    model = make_model()
    ewc = EWC(model, Classification())
    for seed in range(n_tasks):
        ewc.consolidate(make_task(seed))
        shift(model, seed)
        ewc()
    state = ewc.state_dict()
    HOW[how](model)
    calls: list[Callable[[], object]] = [
        ewc,
        lambda: ewc.consolidate(make_task()),
        lambda: ewc.load_state_dict(state),
        ewc.state_dict,
    ]
    if n_tasks:
        calls += [lambda: ewc.fisher, lambda: ewc.anchor]
    for call in calls:
        with raises(RuntimeError, *PARTS, old):
            call()
    assert ewc.n_tasks == n_tasks


def test_a_sharded_state(old: str) -> None:
    model = make_model()
    ewc = EWC(model, Classification())
    ewc.consolidate(make_task())
    state = ewc.state_dict()
    state["fisher"]["0.bias"] = distribute_tensor(state["fisher"]["0.bias"], mesh(), [Shard(0)])
    with raises(RuntimeError, *PARTS, old):
        ewc.load_state_dict(state)


@pytest.mark.parametrize("how", ["fully_shard", "tensor parallel"])
def test_in_a_compiled_penalty(how: str, old: str) -> None:
    model = make_model()
    ewc = EWC(model, Classification())
    ewc.consolidate(make_task())
    shift(model)
    HOW[how](model)
    with raises(RuntimeError, *PARTS, old):
        torch.compile(lambda: ewc(), backend="eager")()
    torch._dynamo.reset()
