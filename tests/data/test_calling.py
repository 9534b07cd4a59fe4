from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc.data.calling import apply
from ewc.errors import InvalidBatch
from tests.support.reading import read, x


class Recorder(nn.Module):
    """Returns how it was called."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs


class TwoInputs(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class TestApply:
    @pytest.mark.parametrize(
        ("raw", "args", "kwargs", "rest"),
        [
            ((1, 2, 3), (1,), {}, (2, 3)),
            ([1], (1,), {}, ()),
            (((x(), 2), 3), None, {}, (3,)),
            (({"a": 1}, 2), (), {"a": 1}, (2,)),
            ({"a": 1, "labels": 2}, (), {"a": 1}, (2,)),
            (UserDict({"a": 1}), (), {"a": 1}, ()),
            ((["one", "object per sample"], 2), (["one", "object per sample"],), {}, (2,)),
        ],
        ids=str,
    )
    def test_calls_the_model(self, raw: Any, args: Any, kwargs: Any, rest: Any) -> None:
        outputs, found = apply(Recorder(), raw)
        assert found == rest
        assert outputs[1] == kwargs
        if args is None:
            args = raw[0]
        assert outputs[0] == tuple(args)

    def test_a_bare_tensor(self) -> None:
        data = x()
        assert apply(nn.Identity(), data) == (data, ())

    def test_a_forward_has_the_whole_batch(self) -> None:
        batch = {"a": 1, "labels": 2}
        model = nn.Identity()
        outputs, rest = apply(model, batch, lambda m, b: (m, b))
        assert outputs[0] is model
        assert outputs[1] is batch
        assert rest == (2,)

    def test_logits_are_taken(self) -> None:
        outputs = SimpleNamespace(logits=x())
        assert torch.equal(apply(nn.Identity(), (outputs,))[0], x())
        assert torch.equal(apply(nn.Identity(), (1,), lambda m, b: outputs)[0], x())
        without = SimpleNamespace(logits=None)
        assert apply(nn.Identity(), (without,))[0] is without

    @pytest.mark.parametrize(
        "raw", [(x(), x(), x()), ({"a": x(), "c": x()}, x()), {"a": x(), "labels": x()}], ids=str
    )
    def test_a_model_with_other_arguments(self, raw: Any) -> None:
        with pytest.raises(
            InvalidBatch, match=r"TwoInputs\.forward\(a: .*found the batch"
        ) as error:
            apply(TwoInputs(), raw)
        assert "def forward(model, batch):" in str(error.value)
        assert isinstance(error.value.__cause__, TypeError)

    def test_type_errors_of_the_model_are_its_own(self) -> None:
        with pytest.raises(TypeError, match="unsupported operand"):
            apply(TwoInputs(), ((x(), "b"), x()))

    def test_type_errors_of_a_model_without_a_signature_are_its_own(self) -> None:
        class Largest(nn.Module):
            forward = staticmethod(max)

        with pytest.raises(TypeError, match="not iterable"):
            apply(Largest(), (1, x()))


@pytest.mark.parametrize(
    "raw", [(x(), x(), x()), {"pixel_values": x()}, SimpleNamespace(), []], ids=str
)
def test_the_forward_template_is_python(raw: Any) -> None:
    with pytest.raises(InvalidBatch) as error:
        apply(TwoInputs(), raw) if isinstance(raw, (tuple, dict)) else read(raw)
    template = str(error.value).partition("    def forward")[2]
    compile("def forward" + template.replace("\n    ", "\n"), "template", "exec")
