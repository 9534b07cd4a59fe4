"""How a collection computes, whatever the caller has switched on."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.backends import cuda, cudnn, mkldnn

_PRODUCTS: tuple[Any, ...] = (cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)  # type: ignore[attr-defined]


def is_half_precision(model: nn.Module) -> bool:
    """Whether a model computes in half precision: in its parameters, its buffers or autocast."""
    state = [*model.parameters(), *model.buffers()]
    devices = {each.device.type for each in state if not each.is_meta}
    is_narrow = any(each.is_floating_point() and each.element_size() < 4 for each in state)
    return is_narrow or any(map(torch.is_autocast_enabled, devices))


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32: neither TF32 nor bfloat16."""
    before = [backend.fp32_precision for backend in _PRODUCTS]
    try:
        for backend in _PRODUCTS:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(_PRODUCTS, before, strict=True):
            backend.fp32_precision = precision


def product_context() -> Callable[[], AbstractContextManager[None]]:
    """A context for the collection's own products, while the model's go by the caller's settings.

    It does nothing where the caller's settings are full precision: to enter `full_precision` for
    every product costs more than a small product.
    """
    is_full = all(each.fp32_precision in ("none", "ieee") for each in (cuda.matmul, mkldnn.matmul))  # type: ignore[attr-defined]
    return nullcontext if is_full else full_precision


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Switch cuDNN off: its recurrent layers refuse the reverse pass in eval mode."""
    before = cudnn.enabled
    cudnn.enabled = False
    try:
        yield
    finally:
        cudnn.enabled = before


@contextmanager
def without_compilation() -> Iterator[None]:
    """Run what `torch.compile` has compiled eagerly.

    Compiled code performs operations that no mode sees, and the compiler cannot trace what runs
    inside `vmap`. As long as the compiler is not imported, nothing is compiled.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
