"""Exceptions of the user's code keep their type, and say on what they were raised."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc import EWC, Classification, Custom, InvalidBatch, Regression
from ewc.fisher.notes import add_note
from tests.oracle import nll
from tests.support.asserts import unchanged
from tests.support.tasks import CLASSES, INPUTS, make_model, make_task


class Broken(Exception):  # noqa: N818
    """An error of the user's own."""


class Fixed(nn.Module):
    """Works on batches of 16 only."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, CLASSES)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.view(self.size, INPUTS))


def notes_of(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def note(kind: Any, model: nn.Module, batches: Any, likelihood: Any = None, **options: Any) -> str:
    """The one note of the exception that a consolidation ends in."""
    ewc = EWC(model, likelihood or Classification(), **options)
    with unchanged(ewc, model), pytest.raises(kind) as error:
        ewc.consolidate(batches)
    (found,) = notes_of(error.value)
    return found


def failing(when: Callable[[Tensor], bool]) -> Callable[[nn.Module, Any], Tensor]:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        if when(batch[0]):
            raise Broken("of the user")
        return model(batch[0])

    return forward


def test_of_the_model() -> None:
    found = note(RuntimeError, Fixed(), make_task(size=16))
    assert found == (
        "in batch 0 (counted from 0), (Tensor[16, 5] float32, Tensor[16] int64), cut to 2 samples: "
        "model, forward and likelihood must run on one sample alone."
    )
    assert "cut to 1 sample:" in note(RuntimeError, Fixed(2), make_task(size=16))


def test_of_inputs_in_another_dtype() -> None:
    found = note(RuntimeError, make_model().to(torch.bfloat16), make_task())
    assert "found float32 beside parameters in bfloat16. Fix: cast the inputs" in found
    found = note(RuntimeError, make_model(), [(x.double(), y) for x, y in make_task()])
    assert "found float64 beside parameters in float32" in found


def test_of_forward() -> None:
    found = note(Broken, make_model(), make_task(), forward=failing(lambda x: len(x) == 1))
    assert "batch 0" in found
    assert "Tensor[4, 5] float32" in found
    assert "cut to 1 sample:" in found


def test_of_the_likelihood() -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise Broken("of the user")

    found = note(Broken, make_model(), make_task(), Custom(broken))
    assert "cut to 1 sample:" in found


@pytest.mark.parametrize("container", [list, iter])
@pytest.mark.parametrize("index", [0, 1, 4])
def test_of_a_later_batch(container: Any, index: int) -> None:
    """Bundled with others, or not; read where vmap cannot, or not."""
    task = make_task(batches=6)
    task[index][0][3] = 99.0

    def forward(model: nn.Module, batch: Any) -> Tensor:
        if bool((batch[0] == 99).any()):
            raise Broken("of the user")
        return model(batch[0])

    found = note(Broken, make_model(), container(task), forward=forward)
    assert f"in batch {index} (counted from 0)" in found
    assert "(Tensor[4, 5] float32, Tensor[4] int64), cut to 1 sample" in found


def test_of_a_backward() -> None:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise Broken("of the user")

    found = note(Broken, make_model(), make_task(), forward=lambda m, b: Function.apply(m(b[0])))
    assert "batch 0" in found


def test_of_a_subclass_of_our_error() -> None:
    class Mine(InvalidBatch):
        pass

    def forward(model: nn.Module, batch: Any) -> Tensor:
        raise Mine("of the user")

    assert "cut to 2 samples" in note(Mine, make_model(), make_task(), forward=forward)


def test_once_for_an_error_that_comes_only_once() -> None:
    calls = iter(range(100))
    task = make_task(batches=6)
    forward = failing(lambda x: next(calls) == 4)
    assert "in one of the batches 0 to 5" in note(Broken, make_model(), task, forward=forward)


def test_errors_of_the_loader_have_none() -> None:
    def loader() -> Any:
        yield make_task()[0]
        raise Broken("of the loader")

    with pytest.raises(Broken) as error:
        EWC(make_model(), Classification()).consolidate(loader())
    assert notes_of(error.value) == []


def test_errors_of_ours_have_none() -> None:
    model = nn.Sequential(nn.Linear(INPUTS, CLASSES), nn.BatchNorm1d(CLASSES))
    model[1].track_running_stats, model[1].running_mean, model[1].running_var = False, None, None
    with pytest.raises(ValueError, match="mixes them") as error:
        EWC(model, Classification()).consolidate(make_task())
    assert notes_of(error.value) == []


def test_long_batches_are_abridged() -> None:
    batch = (
        torch.zeros(4, INPUTS),
        {f"a long name of number {i}": torch.zeros(4) for i in range(90)},
    )
    found = note(RuntimeError, Fixed(), [batch], Custom(lambda out, _: out.sum(1)))
    assert len(found) < 500
    assert "Tensor[4, 5]" in found


def test_notes_before_python_3_11() -> None:
    error = ValueError("text")
    add_note(error, "first")
    add_note(error, "second")
    assert notes_of(error) == ["first", "second"]


class TestShapes:
    """An `InvalidBatch` shows the shapes of the loader, not those of the samples it is cut into."""

    def refusal(self, model: nn.Module, batches: Any, likelihood: Any, **options: Any) -> str:
        ewc = EWC(model, likelihood, **options)
        with unchanged(ewc, model), pytest.raises(InvalidBatch) as error:
            ewc.consolidate(batches)
        return str(error.value)

    def test_of_the_whole_batch(self) -> None:
        model, x = make_model(), torch.zeros(16, INPUTS)
        wrong = torch.zeros(16, CLASSES + 1)
        message = self.refusal(model, [(x, wrong)], Regression())
        assert "[16, 3]; found Tensor[16, 4] float32" in message
        assert "cut to" not in message
        message = self.refusal(model, [(x, x[:, 0].long()), (x, wrong)], Classification())
        assert "in batch 1 (counted from 0)" in message
        assert "[16, 3] with 3 classes; found Tensor[16, 4]" in message

    def test_of_a_reduced_nll(self) -> None:
        message = self.refusal(make_model(), make_task(), Custom(lambda out, y: nll(out, y).mean()))
        assert "nll(outputs, *rest) -> [4], one value per sample" in message

    @pytest.mark.parametrize("outputs", [1, 2])
    def test_of_the_batch_and_its_samples_where_the_batch_is_valid(self, outputs: int) -> None:
        """A squeeze() without a dimension works on every batch, but not on one sample."""
        model = nn.Linear(INPUTS, outputs)
        batch = (torch.zeros(4, INPUTS), torch.zeros(4, outputs).squeeze())
        message = self.refusal(model, [batch], Regression(), forward=lambda m, b: m(b[0]).squeeze())
        assert "the batch (Tensor[4, 5] float32, Tensor[4" in message
        assert "cut to 1 sample" in message
        assert "squeeze(-1)" in message
        model, likelihood = nn.Linear(INPUTS, 1), Regression()
        EWC(model, likelihood, forward=lambda m, b: m(b[0]).squeeze(-1)).consolidate(
            [(torch.ones(4, INPUTS), torch.zeros(4))]
        )
