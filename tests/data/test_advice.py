"""What errors suggest is followed here word by word, and must not lead to another error."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ewc import EWC, Bernoulli, Classification, Custom, Likelihood, Regression, TimeSeries
from ewc.data.advice import accepts, conversion, forward_template
from ewc.errors import InvalidBatch
from tests import oracle
from tests.support.asserts import assert_close

N = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def forward_in(message: str) -> Callable[[nn.Module, Any], Any]:
    """The `forward` that a message suggests."""
    lines = message[message.index("    def forward") :].splitlines()
    stop = next((i for i, line in enumerate(lines) if i and not line.startswith(" " * 8)), None)
    space: dict[str, Any] = {}
    exec("\n".join(line[4:] for line in lines[:stop]), space)
    found: Callable[[nn.Module, Any], Any] = space["forward"]
    return found


def batches_in(message: str, loader: list[Any]) -> list[Any]:
    """The batches that a message suggests to yield: the first generator in it."""
    (found, *_) = re.findall(r"(\(.+? for \w+(?:, [*\w]+)* in loader\))", message)
    while found.count("(") < found.count(")"):
        found = found[1:]
    start = max(i for i in range(len(found)) if _is_generator(found[i:]))
    return list(eval(found[start:], {"loader": loader, "torch": torch}))


def _is_generator(code: str) -> bool:
    try:
        compile(code, "", "eval")
    except SyntaxError:
        return False
    return code.startswith("(") and " for " in code


def refusal(model: nn.Module, likelihood: Likelihood, batch: Any, **options: Any) -> str:
    with pytest.raises(InvalidBatch) as error:
        EWC(model, likelihood, **options).consolidate([batch])
    return str(error.value)


def fisher(model: nn.Module, likelihood: Likelihood, batches: Any, **options: Any) -> Any:
    ewc = EWC(model, likelihood, **options)
    ewc.consolidate(batches)
    return dict(ewc.fisher)


class TwoInputs(nn.Module):
    """As Avalanche's models with a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        return self.layer(x) * (1 + task_labels[:, None])


class Named(TwoInputs):
    def forward(self, pixels: Tensor, mask: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.layer(pixels) * mask[:, None] * scale


class OneInput(TwoInputs):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.layer(x)


def x() -> Tensor:
    return torch.randn(N, 5).double()


def y() -> Tensor:
    return torch.randint(3, (N,))


class TestMappingsWithoutLabels:
    @pytest.mark.parametrize(
        ("model", "batch", "target"),
        [
            (OneInput(), {"x": x(), "y": y()}, "y"),
            (OneInput(), {"image": x(), "target": y(), "index": torch.arange(N)}, "target"),
            (OneInput(), {"target": y(), "image": x()}, "target"),
            (OneInput(), {"image": x(), "what": y()}, "what"),
            (Named(), {"pixels": x(), "mask": torch.rand(N).double(), "label": y()}, "label"),
            (TwoInputs(), {"a": x(), "b": torch.arange(N), "y": y()}, "y"),
            (nn.Linear(5, 3).double(), {0: x(), 1: y()}, 1),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("with_forward", [True, False])
    def test_both_ways_out_work(
        self, model: nn.Module, batch: Any, target: str, with_forward: bool
    ) -> None:
        likelihood = Classification()
        options = {"forward": lambda model, batch: model(batch["x"])} if with_forward else {}
        message = refusal(model, likelihood, batch, **options)
        assert all(repr(key) in message for key in batch)
        assert "for b in loader)" in message
        assert "Custom(" in message
        inputs = tuple(value for key, value in batch.items() if key not in (target, "index"))
        sums = oracle.empirical(model, (inputs, batch[target]))
        expected = {name: each / N for name, each in sums.items()}
        assert_close(fisher(model, likelihood, batches_in(message, [batch])), expected, 1e-12)
        space = {"Custom": Custom, "likelihood": likelihood}
        custom = eval(re.search(r"Custom\(.*?nll\(\*out\).*?\)", message)[0], space)
        found = fisher(model, custom, [batch], forward=forward_in(message))
        assert_close(found, expected, 1e-12)

    def test_along_another_dimension(self) -> None:
        model, likelihood = nn.Linear(5, 3).double(), TimeSeries()
        batch = {"x": torch.randn(2, N, 5).double(), "y": torch.randint(3, (2, N))}
        message = refusal(model, likelihood, batch)
        found = fisher(model, likelihood, batches_in(message, [batch]))
        custom = Custom(lambda out: likelihood.nll(*out), batch_dim=1)
        assert "nll(*out), batch_dim=1)" in message
        again = fisher(model, custom, [batch], forward=forward_in(message))
        assert_close(again, found, 1e-12)

    def test_of_a_function_that_takes_targets(self) -> None:
        message = refusal(OneInput(), Custom(oracle.nll), {"x": x(), "y": y()})
        assert "found the keys 'x', 'y'" in message

    def test_one_key(self) -> None:
        assert "yield the targets, too" in refusal(OneInput(), Classification(), {"x": x()})

    def test_are_read_where_no_targets_are_needed(self) -> None:
        batch = {"x": x()}
        assert fisher(OneInput(), Custom(lambda out: out.square().sum(1)), [batch])
        assert fisher(OneInput(), Classification(), [batch], fisher_type="exact")
        assert fisher(OneInput(), Classification(), [batch], fisher_type="mc")

    def test_of_other_names_than_the_models_inputs(self) -> None:
        batch = {"image": x(), "y": y()}
        for likelihood, fisher_type in (
            (Custom(lambda out: out.square().sum(1)), "empirical"),
            (Classification(), "exact"),
        ):
            message = refusal(OneInput(), likelihood, batch, fisher_type=fisher_type)
            forward = forward_in(message)
            assert fisher(OneInput(), likelihood, [batch], fisher_type=fisher_type, forward=forward)


class TestForwards:
    @pytest.mark.parametrize(
        ("model", "batch"),
        [
            (TwoInputs(), (x(), y(), torch.arange(N))),
            (TwoInputs(), (x(), y(), torch.arange(N), torch.arange(N))),
            (OneInput(), ((x(), x()), y())),
            (OneInput(), {"pixels": x(), "labels": y()}),
            (TwoInputs(), ((x(), torch.arange(N), x()), y())),
            (Named(), {"mask": torch.rand(N).double(), "pixels": x(), "labels": y(), "id": y()}),
        ],
        ids=str,
    )
    def test_pass_as_many_inputs_as_the_model_requires(self, model: nn.Module, batch: Any) -> None:
        message = refusal(model, Classification(), batch)
        assert fisher(model, Classification(), [batch], forward=forward_in(message))

    def test_name_inputs_that_the_batch_lacks(self) -> None:
        template = forward_template((x(), y()), TwoInputs())
        assert "task_labels = ...  # not in the batch?" in template
        assert "return model(inputs, task_labels)" in template

    def test_without_a_signature(self) -> None:
        class Largest(nn.Module):
            forward = staticmethod(max)

        assert "model(inputs)" in forward_template((x(), y()), Largest())
        assert accepts(max, 1, 2, 3)


class TestArrays:
    @pytest.mark.parametrize(
        ("batch", "likelihood"),
        [
            ((np.random.rand(N, 5), np.array([0, 1, 2, 0])), Classification()),
            ([np.random.rand(N, 5).astype("float32"), torch.zeros(N).long()], Classification()),
            ((torch.rand(N, 5), np.random.rand(N, 3)), Regression()),
            ((torch.rand(N, 5), np.zeros(N, int), np.array(["a"] * N)), Classification()),
            ({"input": np.random.rand(N, 5), "labels": np.zeros(N, int)}, Classification()),
            ((np.random.rand(N, 5), torch.zeros(N).long(), None), Classification()),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_become_tensors(self, batch: Any, likelihood: Likelihood) -> None:
        model = nn.Linear(5, 3)
        message = refusal(model, likelihood, batch)
        assert "found an array, ndarray, at batch" in message
        assert fisher(model, likelihood, batches_in(message, [batch]))

    def test_alone(self) -> None:
        message = refusal(
            nn.Linear(5, 3), Classification(), np.random.rand(N, 5), fisher_type="exact"
        )
        batches = batches_in(message, [np.random.rand(N, 5)])
        assert fisher(nn.Linear(5, 3), Classification(), batches, fisher_type="exact")

    def test_scalars_are_shared(self) -> None:
        assert conversion((np.float64(1.0), 2)) == "(b[0], b[1])"
        batch = (x(), y(), np.int64(3))
        assert fisher(OneInput(), Classification(), [batch])


@pytest.mark.parametrize("likelihood", [Regression, Bernoulli])
@pytest.mark.parametrize(("outputs", "targets"), [((N, 1), (N,)), ((N,), (N, 1))])
def test_targets_that_lack_a_dimension_or_have_one_more(
    likelihood: Any, outputs: Any, targets: Any
) -> None:
    model = nn.Sequential(
        nn.Linear(5, 1), nn.Unflatten(1, (1,)), nn.Flatten(0 if outputs == (N,) else 1)
    )
    batch = (torch.rand(N, 5), torch.ones(targets))
    message = refusal(model, likelihood(), batch)
    transform = eval(re.search(r"target_transform=(.*)\.$", message)[1])
    assert fisher(model, likelihood(target_transform=transform), [batch])


class TestLikelihoods:
    def test_a_bare_tensor_for_a_function_of_the_outputs(self) -> None:
        likelihood = Custom(lambda out: out.square().sum(1))
        message = refusal(OneInput(), likelihood, x())
        assert fisher(OneInput(), likelihood, batches_in(message, [x()]))

    @pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
    @pytest.mark.parametrize(
        ("nll", "batch", "rest"),
        [
            (lambda out: out.square().sum(1), (x(), y()), "(Tensor[4] int64)"),
            (lambda out, y: oracle.nll(out, y), (x(), y(), y()), "(Tensor[4] int64, Tensor[4]"),
            (lambda out, y, ids: oracle.nll(out, y), (x(), y()), "(Tensor[4] int64)"),
        ],
    )
    def test_a_function_of_other_arguments(
        self, nll: Any, batch: Any, rest: str, fisher_type: Any
    ) -> None:
        likelihood = Custom(nll, sample=lambda out: out.argmax(1))
        message = refusal(OneInput(), likelihood, batch, fisher_type=fisher_type)
        assert "nll(outputs, *rest)" in message
        assert f"rest = {rest}" in message
        assert "found nll(out" in message

    def test_a_subclass_of_other_arguments(self) -> None:
        class Mine(Likelihood):
            def nll(self, outputs: Tensor) -> Tensor:
                return outputs.square().sum(1)

            def exact_terms(self, outputs: Tensor) -> Tensor:
                return outputs.t()

        for fisher_type, name in (("empirical", "nll"), ("exact", "exact_terms")):
            message = refusal(OneInput(), Mine(), (x(), y()), fisher_type=fisher_type)
            assert f"found {name}(outputs" in message
            batches = batches_in(message, [(x(), y())])
            assert fisher(OneInput(), Mine(), batches, fisher_type=fisher_type)

    def test_type_errors_inside_a_function_are_its_own(self) -> None:
        def nll(outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs + "text"

        with pytest.raises(TypeError, match="unsupported operand"):
            EWC(OneInput(), Custom(nll)).consolidate([(x(), y())])


class TestTimeFirst:
    """Inputs `[S, N, F]` beside targets `[N]`."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(5, 4).double(), nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][-1])

    @pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
    def test_both_ways_out_work(self, fisher_type: Any) -> None:
        model, batch = self.Last(), (torch.randn(7, N, 5).double(), y())
        message = refusal(model, Classification(), batch, fisher_type=fisher_type)
        assert "batch[0]: 7 in Tensor[7, 4, 5]" in message
        assert "Custom(likelihood.nll, batch_dim=1)" in message
        space: dict[str, Any] = {"Classification": Classification}
        exec(message[message.index("class TimeFirst") :].replace("\n    ", "\n"), space)
        found = fisher(model, space["TimeFirst"](), [batch], fisher_type=fisher_type)
        if fisher_type == "empirical":
            sums = oracle.empirical(model, batch, dim=1)
            assert_close(found, {name: each / N for name, each in sums.items()}, 1e-12)
            custom = Custom(Classification().nll, batch_dim=1)
            assert_close(fisher(model, custom, [batch]), found, 1e-12)

    def test_is_not_suggested_elsewhere(self) -> None:
        for batch in (
            (torch.zeros(7, N, 5), torch.zeros(3)),
            (torch.zeros(7, 2), torch.zeros(3)),
        ):
            with pytest.raises(InvalidBatch) as error:
                EWC(OneInput(), Classification()).consolidate([batch])
            assert "time first" not in str(error.value)
