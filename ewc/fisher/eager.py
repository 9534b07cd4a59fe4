"""Compiled models, run as they are written."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_compilation() -> Iterator[None]:
    """Run what was compiled by `torch.compile` eagerly.

    Compiled code performs operations that no interception sees, and the compiler cannot trace what
    runs inside `vmap`. Without compilers imported, there is nothing compiled.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
