"""How a collection computes, whatever the caller has switched on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.backends import cuda, cudnn, mkldnn

_PRODUCTS: tuple[Any, ...] = (cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)  # type: ignore[attr-defined]


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
