"""Values that come from outside in a state: converted to plain types, compared, and shown.

A state may come from another library, or have passed through one, so that a number is a
`numpy.float64`, a name a `numpy.str_`, a tensor an `nn.Parameter` or of a class of its own. Such
values would be written to the next checkpoint, which `torch.load(weights_only=True)` then refuses.
"""

import reprlib
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ewc._checks import as_float
from ewc.processes.layout import is_sharded, local


def is_array(value: object) -> bool:
    """Whether `value` is a NumPy array."""
    kind = getattr(sys.modules.get("numpy"), "ndarray", None)
    return kind is not None and isinstance(value, kind)


def plain_int(value: object) -> int | None:
    """`value` as an `int`; None if it is no integer."""
    value = _unboxed(value)
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def plain_float(value: object) -> float | None:
    """`value` as a `float`; None if it is no real number."""
    value = _unboxed(value)
    return as_float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def plain_names(value: object) -> list[str] | None:
    """`value` as a list of `str`; None if it is no list of names."""
    names = value.tolist() if is_array(value) else value  # type: ignore[attr-defined]
    if not isinstance(names, (list, tuple)) or not all(isinstance(each, str) for each in names):
        return None
    return list(map(plain_name, names))


def plain_name(name: str) -> str:
    """`name` as a `str`, if it is of a subclass."""
    return name if type(name) is str else str.__str__(name)


def wraps_others(value: Tensor) -> bool:
    """Whether the class of a tensor wraps other tensors, so that it has no values of its own."""
    own: Any = type(value)
    plain: Any = Tensor
    return own.__torch_dispatch__ is not plain.__torch_dispatch__


def is_foreign(value: Tensor) -> bool:
    """Whether a tensor wraps others, and is not a sharded one."""
    return wraps_others(value) and not is_sharded(value)


def plain_tensor(value: Tensor) -> Tensor:
    """`value` as a `Tensor` on the same memory, without a graph.

    One that wraps others, as a sharded one does, keeps its class.
    """
    if wraps_others(value):
        return value.detach()
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.as_subclass(value.detach(), Tensor)


def tensor_of(array: Any) -> Tensor:
    """A tensor with the values of a NumPy array of numbers: a copy."""
    return torch.tensor(array.astype(array.dtype.newbyteorder("="), order="C"))


def equal(found: object, own: object) -> bool:
    """Whether an option in a state is that of the object: strings, numbers, tensors by name."""
    if isinstance(own, Mapping):
        return (
            isinstance(found, Mapping)
            and found.keys() == own.keys()
            and all(equal(found[key], own[key]) for key in own)
        )
    if isinstance(own, Tensor):
        return _equal_tensors(found, own)
    if isinstance(own, str):
        return isinstance(found, str) and found == own
    return plain_float(found) == own


def shown(value: object) -> str:
    """A value in a message: of limited length and depth, without the entries of tensors."""
    try:
        return _SHORT.repr(value)
    except Exception:  # a repr of the user's own
        return f"a {type(value).__name__}"


def _unboxed(value: object) -> object:
    """The entry of an array or a tensor of shape `[]`; any other value as it is."""
    if isinstance(value, Tensor):
        has_value = not wraps_others(value) and not value.is_nested and not value.is_meta
        return plain_tensor(value).item() if has_value and value.dim() == 0 else value
    return value.item() if is_array(value) and value.shape == () else value  # type: ignore[attr-defined]


def _equal_tensors(found: object, own: Tensor) -> bool:
    if is_array(found):
        if tuple(found.shape) != tuple(own.shape):  # type: ignore[attr-defined]
            return False
        found = torch.tensor(found.tolist(), dtype=torch.float64)  # type: ignore[attr-defined]
    if not isinstance(found, Tensor) or is_foreign(found) or found.is_nested:
        return False
    known, own = local(plain_tensor(found)), local(own)
    if known.is_meta or known.layout is not torch.strided or known.is_complex():
        return False
    if known.shape != own.shape:
        return False
    return torch.equal(known.to("cpu", torch.float64), own.to("cpu", torch.float64))


class _Short(reprlib.Repr):
    """`reprlib.Repr`, with tensors and arrays by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 80

    @override
    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor):
            place = " on the meta device" if x.is_meta else ""
            return (
                "a nested tensor" if x.is_nested else f"a tensor of shape {tuple(x.shape)}{place}"
            )
        return f"an array of shape {x.shape}" if is_array(x) else super().repr1(x, level)


_SHORT = _Short()
