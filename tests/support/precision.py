"""The precision of float32 products: what callers set, in either interface, and what is in force.

As a script: for each caller, in a process of its own, what is in force after a consolidation, and
what it would be without one.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ewc import EWC, Classification

_BACKENDS = torch.backends
_KEYS = [("generic", "all")] + [
    (backend, operation)
    for backend in ("cuda", "mkldnn")
    for operation in ("all", "matmul", "conv", "rnn")
]
HAS_SETTINGS = hasattr(torch._C, "_get_fp32_precision_getter")  # by backend, from torch 2.9 on


def _mixed() -> None:
    torch.set_float32_matmul_precision("medium")
    _BACKENDS.cuda.matmul.fp32_precision = "ieee"
    _BACKENDS.cudnn.conv.fp32_precision = "ieee"


def _nested() -> None:
    _BACKENDS.fp32_precision = "tf32"
    _BACKENDS.cudnn.fp32_precision = "tf32"
    _BACKENDS.cuda.matmul.fp32_precision = "tf32"
    _BACKENDS.mkldnn.conv.fp32_precision = "bf16"


def _flags() -> str:
    with _BACKENDS.cudnn.flags(enabled=False):
        return "entered"


OLD: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "flags": _flags,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "allow for cuBLAS": lambda: setattr(_BACKENDS.cuda.matmul, "allow_tf32", True),
    "not for cuDNN": lambda: setattr(_BACKENDS.cudnn, "allow_tf32", False),
}
NEW: dict[str, Callable[[], object]] = {
    "all tf32": lambda: setattr(_BACKENDS, "fp32_precision", "tf32"),
    "all bf16": lambda: setattr(_BACKENDS, "fp32_precision", "bf16"),
    "all ieee": lambda: setattr(_BACKENDS, "fp32_precision", "ieee"),
    "CUDA tf32": lambda: setattr(_BACKENDS.cudnn, "fp32_precision", "tf32"),
    "products tf32": lambda: setattr(_BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "convolutions ieee": lambda: setattr(_BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "CPU bf16": lambda: setattr(_BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "at all levels": _nested,
    "both interfaces": _mixed,
}
CALLERS = {**OLD, **NEW} if HAS_SETTINGS else OLD


READERS: dict[str, Callable[[], object]] = {
    "cudnn.flags": _flags,
    "cudnn.allow_tf32": lambda: _BACKENDS.cudnn.allow_tf32,
    "cuda.matmul.allow_tf32": lambda: _BACKENDS.cuda.matmul.allow_tf32,
    "matmul precision": torch.get_float32_matmul_precision,
}


def settings() -> dict[str, object]:
    """Whatever can be read; where the interfaces disagree, that reading fails."""
    found: dict[str, object] = {"cuDNN": _BACKENDS.cudnn.enabled}
    for name, read in READERS.items():
        if name != "cudnn.flags":  # reading must not change anything
            try:
                found[name] = read()
            except RuntimeError as error:
                found[name] = str(error).split("(", 1)[0]
    if HAS_SETTINGS:
        found.update({".".join(key): torch._C._get_fp32_precision_getter(*key) for key in _KEYS})
    return found


SEEN: list[dict[str, object]] = []
"""What was in force in each run; not an attribute of the model, which would be restored."""


class Reader(nn.Module):
    """Reads settings in its forward, and notes what is in force there."""

    def __init__(self, readers: list[Callable[[], object]]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.readers = readers

    def forward(self, x: Tensor) -> Tensor:
        for read in self.readers:
            read()
        SEEN.append(settings())
        return self.layer(x)


def observed(caller: str, *, consolidates: bool) -> dict[str, Any]:
    """What is in force after a consolidation, and after each later change of what is inherited."""
    CALLERS[caller]()
    # Whatever can be read outside of a consolidation. `cudnn.flags` leaves another default behind.
    readers = [
        read
        for name, read in READERS.items()
        if not (name == "cudnn.flags" and caller == "nothing") and _works(read)
    ]
    model = Reader(readers)
    if consolidates:
        EWC(model, Classification()).consolidate([(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))])
    after = [settings()]
    if HAS_SETTINGS:
        for key in (("generic", "all"), ("cuda", "all"), ("mkldnn", "all")):
            for precision in ("ieee", "tf32", "none"):
                torch._C._set_fp32_precision_setter(*key, precision)
                after.append(settings())
    return {"seen": SEEN, "after": after}


def _works(read: Callable[[], object]) -> bool:
    try:
        read()
    except RuntimeError:
        return False
    return True


def _main() -> None:
    assert threading.active_count() == 1  # nothing is lost by forking
    for caller in CALLERS:
        for consolidates in (False, True):
            sys.stdout.flush()
            if os.fork() == 0:
                found = observed(caller, consolidates=consolidates)
                print(json.dumps([caller, consolidates, found]), flush=True)
                os._exit(0)
            os.wait()


if __name__ == "__main__":
    _main()
