"""The device that the tests of this folder run on, and what they share.

`EWC_REHEARSE=1` runs them on the CPU: it shows that the tests themselves work, before a device is
to be had.
"""

import copy
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tests import oracle

REHEARSAL = bool(os.environ.get("EWC_REHEARSE"))
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
CUDA = torch.cuda.is_available()
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or REHEARSAL), reason="needs an accelerator"),
    # Said once by PyTorch, when synchronisations are first counted.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
needs_cuda = [*needs_gpu, pytest.mark.skipif(not CUDA, reason="needs an accelerator")]


def on_device(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """All tensors of a tree on the device; those of floating-point numbers in `dtype`."""

    def to(tensor: Tensor) -> Tensor:
        return tensor.to(DEVICE, dtype if tensor.is_floating_point() else None)

    return tree_map_only(Tensor, to, tree)


def move(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """The model on the device, in `dtype`; one with complex numbers stays as it is."""
    real = not any(each.is_complex() for each in model.parameters())
    model.to(DEVICE, dtype if real else None)


def expected_sums(model: nn.Module, batch: tuple[Any, Tensor]) -> dict[str, Tensor]:
    """The oracle's sums of squares: on the CPU, in float64, from the values as they are."""

    def wide(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        if tensor.is_complex():
            return tensor.to(torch.complex128)
        return tensor.double() if tensor.is_floating_point() else tensor

    model = copy.deepcopy(model).cpu()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = wide(tensor.data)
    return oracle.empirical(model, tree_map_only(Tensor, wide, batch))


def assert_near(found: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float) -> None:
    """Each tensor is off by no more than a share of its norm; all that are not are named."""
    assert list(found) == list(right)
    largest = max(float(each.norm()) for each in right.values())
    wrong = {}
    for name, each in right.items():
        # A gradient that is zero but for rounding is compared with the largest of all.
        scale = max(float(each.norm()), tolerance**2 * largest)
        error = float((found[name].detach().cpu().double() - each.cpu().double()).norm()) / scale
        if not error <= tolerance:
            wrong[name] = f"{error:.2e}"
    assert not wrong, f"off by more than {tolerance:g}: {wrong}"


def tf32() -> AbstractContextManager[None]:
    """As callers do who want TF32 for their model."""
    return _float32("high", "tf32")


def full_precision() -> AbstractContextManager[None]:
    """The model's own products in float32; PyTorch lets cuDNN take TF32 by default."""
    return _float32("highest", "ieee")


@contextmanager
def _float32(products: str, convolutions: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.conv.fp32_precision = convolutions
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.conv.fp32_precision = before[1]


def synchronisations(call: Callable[[], object]) -> Counter[str]:
    """How often each line, outside of PyTorch, made the host wait for the device."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return Counter(
        f"{each.filename}:{each.lineno}"
        for each in caught
        if "called a synchronizing" in str(each.message)
    )
