"""One process over NCCL, or over gloo in a rehearsal: wrappers and collectives on the device."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ewc import EWC, Classification
from ewc.processes.ranks import Ranks
from tests.gpu.support import DEVICE, REHEARSAL, assert_near, move, needs_gpu, on_device
from tests.support.tasks import make_model, make_task, shift

pytestmark = needs_gpu


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    backend = "gloo" if REHEARSAL else "nccl"
    options = {} if REHEARSAL else {"device_id": torch.device("cuda", 0)}
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, **options)
    yield
    dist.destroy_process_group()


def consolidated(model: nn.Module, inner: nn.Module) -> EWC:
    ewc = EWC(model, Classification(), strength=7.0)
    for seed in range(2):
        ewc.consolidate(on_device(make_task(seed)))
        shift(inner, seed)
    return ewc


def test_wrapped(world: None) -> None:
    plain, inner = make_model(), make_model()
    move(plain)
    move(inner)
    wrapped = DistributedDataParallel(inner, device_ids=None if REHEARSAL else [0])
    expected, found = consolidated(plain, plain), consolidated(wrapped, inner)
    assert list(found.fisher) == list(expected.fisher)
    assert_near(found.fisher, expected.fisher, 1e-6)
    assert found().item() == pytest.approx(expected().item(), rel=1e-5)
    (wrapped(on_device(make_task()[0][0])).sum() + found()).backward()
    assert all(each.grad is not None for each in inner.parameters())


def test_collectives_on_the_device(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of one is left out; here it is not, so that each collective runs once."""
    ranks = Ranks(device=DEVICE)
    ranks._data = ranks._all = (dist.group.WORLD,)
    monkeypatch.setattr("ewc._ewc.ranks_of", lambda *_: ranks)
    model, plain = make_model(), make_model()
    move(model)
    move(plain)
    found = consolidated(model, model)
    monkeypatch.undo()
    assert_near(found.fisher, consolidated(plain, plain).fisher, 1e-6)


def test_a_failure_is_raised(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(device=DEVICE)
    ranks._data = ranks._all = (dist.group.WORLD,)
    monkeypatch.setattr("ewc._ewc.ranks_of", lambda *_: ranks)
    model = make_model()
    move(model)
    ewc = EWC(model, Classification())
    with pytest.raises(ValueError, match="at least one sample"):
        ewc.consolidate([])
