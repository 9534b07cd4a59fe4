"""Collection against the slow oracle, for every model of the zoo."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ewc import Classification
from ewc.fisher import Squares, collect
from tests import oracle
from tests.architectures import CASES, build


def collected(model: torch.nn.Module, batches: Any, **options: Any) -> Squares:
    defaults: dict[str, Any] = {
        "likelihood": Classification(),
        "forward": None,
        "fisher_type": "empirical",
        "max_samples": None,
        "generator": None,
    }
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return collect(model, parameters, batches, **{**defaults, **options})


def nll(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(expected)
    largest = max(each.max() for each in expected.values())
    for name in found:
        # A gradient that is zero but for rounding is compared with the largest of all.
        scale = max(expected[name].max(), tolerance**2 * largest)
        error = (found[name].double() - expected[name]).abs().max()
        assert error <= tolerance * scale, f"{name}: {error / scale:.2e} of the largest entry"


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model, inputs, targets = build(case, 6, dtype)
    before = copy.deepcopy(model.state_dict())
    found = collected(model, [(inputs, targets)])
    expected = oracle.empirical(model, (inputs, targets), nll)
    assert_close(found.sums, expected, 1e-9 if dtype == torch.float64 else 1e-4)
    assert found.samples == 6
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for parameter, path in found.paths.items():
        wanted = [p for prefix, p in (case.slow or {}).items() if parameter.startswith(prefix)]
        assert wanted[:1] == ["any"] or path == (wanted or ["rule"])[0], parameter
