"""Penalty, state and synchronisations on the device."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from ewc import EWC, Classification, OnlineEWC
from tests.gpu.support import (
    DEVICE,
    assert_near,
    expected_sums,
    move,
    needs_cuda,
    needs_gpu,
    on_device,
    synchronisations,
    tf32,
)
from tests.support.tasks import as_task, make_model, make_task, shift, written_out

pytestmark = needs_gpu
KINDS = pytest.mark.parametrize("kind", [EWC, OnlineEWC])
BATCHES = 12


class Wide(nn.Module):
    """Parameters of many sizes, which the penalty lays side by side or takes in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5000, 300)
        self.layers = nn.Sequential(
            *[nn.Sequential(nn.Linear(300, 300), nn.LayerNorm(300), nn.GELU()) for _ in range(5)]
        )
        self.read = nn.Linear(300, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.layers(self.table(x)).mean(1))


def wide_task(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(5000, (12, 7), generator=generator)
    return on_device([(x, torch.randint(3, (12,), generator=generator))])


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalty_value_and_gradient(kind: type[EWC], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Wide()
    move(model, dtype)
    ewc = kind(model, Classification(), strength=50.0)
    for seed in range(2):
        ewc.consolidate(wide_task(seed))
        shift(model, seed)
    reference = copy.deepcopy(model).cpu().double()
    known = [{n: each.cpu() for n, each in part.items()} for part in as_task(ewc)]
    # Two tasks are one quadratic and a constant, which is the value at its lowest point.
    with torch.no_grad():
        here = {name: each.clone() for name, each in model.named_parameters()}
        for name, each in model.named_parameters():
            each.copy_(ewc.anchor[name])
        least = ewc().item()
        for name, each in model.named_parameters():
            each.copy_(here[name])
    expected = written_out([tuple(known)], reference, 50.0)
    with tf32(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        value = ewc()
    assert value.dtype is torch.float32
    assert value.device.type == DEVICE.type
    assert value.item() == pytest.approx(expected.item() + least, rel=1e-3)
    (3 * value).backward()
    gradients = torch.autograd.grad(expected, list(reference.parameters()))
    found = {name: each.grad for name, each in model.named_parameters()}
    right = {name: 3 * one for name, one in zip(found, gradients, strict=True)}
    # Rounded to the parameters' own type.
    assert_near(found, right, 1e-4 if dtype is torch.float32 else 5e-3)


@KINDS
def test_state_to_the_cpu_and_back(kind: type[EWC]) -> None:
    model = make_model()
    move(model)
    ewc = kind(model, Classification())
    ewc.consolidate(make_task())
    shift(model)
    file = io.BytesIO()
    torch.save(ewc.state_dict(), file)
    file.seek(0)
    elsewhere = copy.deepcopy(model).cpu()
    other = kind(elsewhere, Classification())
    other.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    assert not any(each.is_cuda for each in other.fisher.values())
    assert other().item() == pytest.approx(ewc().item(), rel=1e-6)
    other.consolidate(make_task(1))
    file.seek(0)
    file.truncate()
    torch.save(other.state_dict(), file)
    file.seek(0)
    back = kind(model, Classification())
    back.load_state_dict(torch.load(file, weights_only=True))
    assert all(each.device.type == DEVICE.type for each in back.fisher.values())
    ewc.consolidate(make_task(1))
    assert_near(back.fisher, {n: e.cpu() for n, e in ewc.fisher.items()}, 1e-5)
    shift(model)
    assert back().item() == pytest.approx(ewc().item(), rel=1e-4)


def test_online_with_decay_and_prior() -> None:
    model = make_model()
    reference = copy.deepcopy(model)
    move(model)
    options = {"decay": 0.7, "prior_precision": 0.1, "strength": 3.0}
    found = OnlineEWC(model, Classification(), **options)
    right = OnlineEWC(reference, Classification(), **options)
    for seed in range(3):
        found.consolidate(make_task(seed))
        right.consolidate(make_task(seed))
        shift(model, seed)
        shift(reference, seed)
    assert_near(found.fisher, right.fisher, 1e-5)
    assert found().item() == pytest.approx(right().item(), rel=1e-4)


def test_training_with_autocast_and_a_scaler() -> None:
    model = make_model()
    move(model)
    ewc = EWC(model, Classification())
    ewc.consolidate(make_task())
    shift(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(DEVICE.type)
    before = ewc().item()
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = 0 * model(on_device(make_task()[0][0])).float().sum() + ewc()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert 0 < ewc().item() < before


class TestSynchronisations:
    """`torch.cuda.set_sync_debug_mode` sees copies to the host and reads of values."""

    pytestmark = needs_cuda

    @pytest.fixture(autouse=True)
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )
        move(model)
        self.model = model
        return model

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, 16, 3, 8, 8, generator=generator)
        y = torch.randint(10, (count, 16), generator=generator)
        return on_device([*zip(x, y, strict=True)])

    def counted(self, fisher_type: str, count: int) -> dict[str, int]:
        ewc = EWC(self.model, Classification(), fisher_type=fisher_type)
        batches = self.batches(count)
        # An iterator is not read ahead: each batch is run on its own.
        return synchronisations(lambda: ewc.consolidate(iter(batches)))

    @pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
    def test_one_more_batch(self, fisher_type: str) -> None:
        self.counted(fisher_type, 2)
        few, many = (self.counted(fisher_type, count) for count in (2, 2 + BATCHES))
        more = {line: each - few[line] for line, each in many.items() if each != few[line]}
        print(f"{fisher_type}, {BATCHES} more batches: {more}; once: {dict(few)}")
        # Whether labels are valid, and whether the sums of the batch before are finite.
        assert sum(more.values()) <= 2 * BATCHES, more

    def test_penalty(self) -> None:
        ewc = EWC(self.model, Classification())
        ewc.consolidate(self.batches(1))
        shift(self.model)
        (ewc() * 2.0).backward()
        assert not synchronisations(lambda: (ewc() * 2.0).backward())
        assert not synchronisations(lambda: torch.autograd.grad(ewc(), [*self.model.parameters()]))

    def test_nothing_else_is_counted(self) -> None:
        one = torch.ones(3, device=DEVICE)
        assert sum(synchronisations(one.tolist).values()) == 1
        assert not synchronisations(lambda: one + one)

    def test_the_fisher_is_right_while_they_are_counted(self) -> None:
        ewc = EWC(self.model, Classification(), strength=1.0)
        (batch,) = self.batches(1)
        assert synchronisations(lambda: ewc.consolidate([batch]))
        expected = {n: e / 16 for n, e in expected_sums(self.model, batch).items()}
        assert_near(ewc.fisher, expected, 1e-4)
