"""The arithmetic of collection's own products, whatever the caller has switched on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
