"""How a collection computes, whatever the caller has switched on."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.backends import cudnn

# The settings by backend and operation, which came with torch 2.9; before, one setting governs all.
_HAS_SETTINGS = hasattr(torch._C, "_get_fp32_precision_getter")
_CUDA, _CPU, _ALL = ("cuda", "matmul"), ("mkldnn", "matmul"), ("generic", "all")
_PRODUCTS = (_CUDA, _CPU, ("mkldnn", "conv"), ("mkldnn", "rnn")) if _HAS_SETTINGS else ()


def is_half_precision(model: nn.Module) -> bool:
    """Whether a model computes in half precision: in its parameters, its buffers or autocast."""
    state = [*model.parameters(), *model.buffers()]
    devices = {each.device.type for each in state if not each.is_meta}
    is_narrow = any(each.is_floating_point() and each.element_size() < 4 for each in state)
    return is_narrow or any(map(torch.is_autocast_enabled, devices))


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32: neither TF32 nor bfloat16.

    Convolutions and recurrent layers of cuDNN may take TF32. cuDNN is switched off rather than its
    settings changed: from torch 2.13 on, their default cannot be restored; and a model may read
    `cudnn.allow_tf32`, or enter `cudnn.flags`, which fail where settings of the old and of the new
    interface disagree.
    """
    inner = None
    before = [(setting, _own(*setting)) for setting in _PRODUCTS]
    try:
        for setting in _PRODUCTS:
            _set(*setting, "ieee")
        # It can be read only now: where the caller has mixed both interfaces, it raises.
        inner = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        with without_cudnn():
            yield
    finally:
        if inner is not None:
            torch.set_float32_matmul_precision(inner)
        for setting, precision in before:
            _set(*setting, precision)


def product_context() -> Callable[[], AbstractContextManager[None]]:
    """A context for the collection's own products, while the model's go by the caller's settings.

    It does nothing where the caller's settings are full precision: to enter `full_precision` for
    every product costs more than a small product.
    """
    if _HAS_SETTINGS:
        is_full = {_get(*_CUDA), _get(*_CPU)} <= {"none", "ieee"}
    else:
        is_full = torch.get_float32_matmul_precision() == "highest"
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


def _get(backend: str, operation: str) -> str:
    """The precision in force: a setting of its own, or an inherited one."""
    return torch._C._get_fp32_precision_getter(backend, operation)


def _set(backend: str, operation: str, precision: str) -> None:
    # Not by `torch.backends`: `mkldnn.fp32_precision` sets that of all backends.
    torch._C._set_fp32_precision_setter(backend, operation, precision)


def _own(backend: str, operation: str) -> str:
    """A setting of its own; "none" where it is inherited, which only a trial can tell."""
    found = _get(backend, operation)
    if backend == "generic" or found == "none":
        return found
    above = _ALL if operation == "all" else (backend, "all")
    if found != _get(*above):
        return found
    own_above = _own(*above)
    try:
        _set(*above, "tf32" if found == "ieee" else "ieee")
        return found if _get(backend, operation) == found else "none"
    finally:
        _set(*above, own_above)
