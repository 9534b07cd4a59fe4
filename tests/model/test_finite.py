"""Which values are not finite."""

import pytest
import torch

from ewc.model.finite import non_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64])
def test_non_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    inf = float("inf")
    values = {
        "empty": [],
        "plain": [1.0, -2.0],
        "sum overflows": [largest, largest],
        "nan": [1.0, float("nan")],
        "inf": [inf, 1.0],
        "infs": [inf, -inf],
    }
    tensors = {name: torch.tensor(each, dtype=dtype) for name, each in values.items()}
    assert non_finite(tensors) == ["nan", "inf", "infs"]
