"""What `gpu.py` asks a device: times, memory, synchronisations, its name, and its precisions."""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import _harness
import torch
from torch import nn

GIB = 2**30
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@contextmanager
def _tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        yield
    finally:
        full_precision()


def full_precision() -> None:
    """The model's own products in float32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def _autocast() -> AbstractContextManager[object]:
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16)


PRECISIONS: dict[str, tuple[Callable[[], AbstractContextManager[object]], float]] = {
    "float32": (nullcontext, 0.01),
    "TF32": (_tf32, 0.05),
    "bf16 autocast": (_autocast, 0.3),
}
"""What the caller switches on, and how far from float32 a result may then be."""


def clock(run: Callable[[], object], repeats: int) -> float:
    """Seconds on the device, from before the first run to after the last."""
    if not CUDA:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_and_waits(run: Callable[[], object]) -> tuple[float, Counter[str]]:
    """What a run takes.

    Returns:
        The largest memory, beyond what was taken before, in bytes; and how often each line has made
        the host wait for the device.
    """
    if not CUDA:
        run()
        return 0.0, Counter()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, Counter(
        f"{Path(each.filename).name}:{each.lineno}"
        for each in caught
        if "called a synchronizing" in str(each.message)
    )


def adamw(model: nn.Module, options: dict[str, bool]) -> Callable[[], object]:
    """A step of AdamW on parameters of their own, with gradients in place."""
    copies = [nn.Parameter(each.detach().clone()) for each in model.parameters()]
    for each in copies:
        each.grad = torch.randn_like(each)
    return torch.optim.AdamW(copies, lr=1e-6, **options).step


def card() -> str:
    """The device and the versions, in one sentence."""
    if not CUDA:
        return f"A rehearsal on the CPU: {_harness.machine('opacus')}."
    properties = torch.cuda.get_device_properties(DEVICE)
    return (
        f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, "
        f"{properties.multi_processor_count} multiprocessors; CUDA {torch.version.cuda}, cuDNN "
        f"{torch.backends.cudnn.version()}; {_harness.machine('opacus')}."
    )
