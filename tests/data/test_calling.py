from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc import EWC, Classification, TimeSeries
from ewc.data.calling import apply
from ewc.errors import InvalidBatch
from tests import oracle
from tests.support.asserts import assert_close
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


class Translator(nn.Module):
    """Makes its decoder's inputs of the labels, and of its encoder's inputs where it has none."""

    def __init__(self, is_encoder_decoder: Any = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
        self.layer = nn.Embedding(5, 5, dtype=torch.float64)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> SimpleNamespace:
        if decoder_input_ids is None:
            decoder_input_ids = (input_ids if labels is None else labels).roll(1, 1)
        hidden = self.layer(decoder_input_ids) + self.layer(input_ids).mean(1, keepdim=True)
        return SimpleNamespace(loss=torch.zeros(()), logits=hidden.tanh())


class TestEncoderDecoders:
    ids, labels, given = torch.randint(5, (3, 6, 4), generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
    @pytest.mark.parametrize("given", ["absent", "None", "ids"])
    @pytest.mark.parametrize("encoder_decoder", [True, False])
    def test_decode_their_labels(self, fisher_type: Any, given: str, encoder_decoder: bool) -> None:
        torch.manual_seed(0)
        model = Translator(encoder_decoder)
        batch: dict[str, Any] = {"input_ids": self.ids, "labels": self.labels}
        decoded: Tensor | None = self.labels.roll(1, 1) if encoder_decoder else None
        if given == "ids":
            batch["decoder_input_ids"] = decoded = self.given
        elif given == "None":
            batch["decoder_input_ids"] = None

        def losses(model: nn.Module, n: int) -> Tensor:
            one = slice(n, n + 1)
            outputs = model(
                self.ids[one], decoder_input_ids=None if decoded is None else decoded[one]
            ).logits[0]
            logs = outputs.log_softmax(1)
            if fisher_type == "exact":
                return (-logs * logs.exp().detach().sqrt()).flatten()
            return -logs.gather(1, self.labels[one].t()).sum()[None]

        likelihood = TimeSeries(Classification(), batch_first=True)
        ewc = EWC(model, likelihood, fisher_type=fisher_type)
        ewc.consolidate([batch])
        expected = oracle.squares(model, losses, 6)
        assert_close(ewc.fisher, {name: each / 6 for name, each in expected.items()}, 1e-12)

    def test_a_forward_decides_for_itself(self) -> None:
        batch = {"input_ids": self.ids, "labels": self.labels}
        model = Translator()
        outputs, rest = apply(model, batch, lambda model, batch: model(batch["input_ids"]))
        assert torch.equal(outputs, model(self.ids).logits)
        assert rest[0] is self.labels

    def test_labels_that_are_objects_are_targets_alone(self) -> None:
        """As of a detector, whose labels are the objects in each image."""
        objects = [{"class_labels": torch.tensor([1])} for _ in range(6)]
        model = Translator()
        outputs, rest = apply(model, {"input_ids": self.ids, "labels": objects})
        assert torch.equal(outputs, model(self.ids).logits)
        assert rest == (objects,)

    def test_without_labels(self) -> None:
        outputs, rest = apply(Translator(), {"input_ids": self.ids})
        assert outputs.shape == (6, 4, 5)
        assert rest == ()
