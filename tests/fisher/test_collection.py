"""Collection against the slow oracle, for every model of the zoo."""

import copy

import pytest
import torch

from tests import oracle
from tests.architectures import CASES, build
from tests.support.asserts import assert_close
from tests.support.collecting import collected


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model, inputs, targets = build(case, 6, dtype)
    before = copy.deepcopy(model.state_dict())
    found = collected(model, [(inputs, targets)])
    expected = oracle.empirical(model, (inputs, targets))
    assert_close(found.sums, expected, 1e-9 if dtype == torch.float64 else 1e-4)
    assert found.samples == 6
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for parameter, path in found.paths.items():
        wanted = [p for prefix, p in (case.slow or {}).items() if parameter.startswith(prefix)]
        assert wanted[:1] == ["any"] or path == (wanted or ["rule"])[0], parameter
