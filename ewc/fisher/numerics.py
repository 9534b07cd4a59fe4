"""How a collection computes, whatever the caller has switched on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.backends import cudnn

from ewc._restoring import restoring
from ewc._switches import Switch

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
    with nullcontext() if _is_full() else _products, without_cudnn:
        yield


def product_context() -> Callable[[], AbstractContextManager[None]]:
    """A context for the collection's own products, while the model's go by the caller's settings.

    It does nothing where the caller's settings are full precision: to enter `full_precision` for
    every product costs more than a small product.
    """
    return nullcontext if _is_full() else full_precision


def _is_full() -> bool:
    """Whether products outside of cuDNN are in full precision, and stay so."""
    if _products.is_changed:  # perhaps by another thread, which may put it back at any time
        return False
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller has mixed both interfaces
        return False
    return older == "highest" and {_get(*each) for each in _PRODUCTS} <= {"none", "ieee"}


def _read_precision() -> tuple[list[str], str]:
    """The caller's settings, and the setting of the older interface."""
    own = [_own(*setting) for setting in _PRODUCTS]

    def read_older() -> str:
        for setting in _PRODUCTS:
            _set(*setting, "ieee")
        # It can be read only now: where the caller has mixed both interfaces, it raises.
        return torch.get_float32_matmul_precision()

    return own, restoring(read_older, always=[partial(_set_all, own)])


def _change_precision() -> None:
    _set_all(["ieee"] * len(_PRODUCTS))
    torch.set_float32_matmul_precision("highest")


def _put_back_precision(before: tuple[list[str], str]) -> None:
    own, older = before
    torch.set_float32_matmul_precision(older)
    _set_all(own)


def _get(backend: str, operation: str) -> str:
    """The precision in force: a setting of its own, or an inherited one."""
    return torch._C._get_fp32_precision_getter(backend, operation)


def _set(backend: str, operation: str, precision: str) -> None:
    # Not by `torch.backends`: `mkldnn.fp32_precision` sets that of all backends.
    torch._C._set_fp32_precision_setter(backend, operation, precision)


def _set_all(precisions: Sequence[str]) -> None:
    for setting, precision in zip(_PRODUCTS, precisions, strict=True):
        _set(*setting, precision)


def _own(backend: str, operation: str) -> str:
    """A setting of its own; "none" where it is inherited, which only a trial can tell."""
    found = _get(backend, operation)
    if backend == "generic" or found == "none":
        return found
    above = _ALL if operation == "all" else (backend, "all")
    if found != _get(*above):
        return found
    own_above = _own(*above)

    def is_own() -> bool:
        _set(*above, "tf32" if found == "ieee" else "ieee")
        return _get(backend, operation) == found

    return found if restoring(is_own, always=[partial(_set, *above, own_above)]) else "none"


without_cudnn = Switch(
    lambda: cudnn.enabled,
    lambda: setattr(cudnn, "enabled", False),
    lambda enabled: setattr(cudnn, "enabled", enabled),
)
"""Switches cuDNN off: its recurrent layers refuse the reverse pass in eval mode."""

_products = Switch(_read_precision, _change_precision, _put_back_precision)
