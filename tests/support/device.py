"""A device that is not the CPU, without one: `made_up`, whose memory is the CPU's.

A tensor on it wraps a tensor of the CPU and computes on that; to everything else (autograd, `vmap`,
the library) it lies on a device of its own. Which operations create tensors on the CPU, and which
read values back, is recorded, and tensors of both devices do not mix, as on an accelerator.

PyTorch can take on one such device in a process, and only before its first reverse pass, so this
module belongs into a process of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

try:
    from torch.utils.backend_registration import (
        _DummyBackendModule,
        _setup_privateuseone_for_python_backend,
    )
except ImportError:
    pytest.skip("a device made of Python alone needs a newer PyTorch", allow_module_level=True)

aten = torch.ops.aten

NAME = "made_up"

READS = {
    aten._local_scalar_dense,  # .item(), bool(), int(), float()
    aten.equal,
    aten.nonzero,
    aten.nonzero_static,
    aten.masked_select,
    aten.repeat_interleave,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
"""Operations whose caller waits for the values: a number, or a shape that depends on them."""

INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""Operations that wait where an index is a mask."""


@dataclass(frozen=True)
class Event:
    """What a device does not do by itself.

    Attributes:
        kind: `"read"` where values go to the CPU, which waits for them; `"upload"` where values
            come from there; `"cpu"` where a tensor is made there.
        operation: Its name in PyTorch.
        age: Of a value that is read: how many operations were called between.
    """

    kind: str
    operation: str
    age: int = 0


class MadeUp(Tensor):
    """A tensor on the device.

    Attributes:
        inner: Its values, on the CPU.
        born: The number of the operation that made it.
    """

    inner: Tensor
    born: int

    @staticmethod
    def __new__(cls, inner: Tensor, born: int) -> "MadeUp":
        made: MadeUp = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner, made.born = inner, born
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} is called outside of a Device")

    # What PyTorch refuses for subclasses.

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with its tensors, which may lie in lists and tuples, replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(function, each) for each in value)
    return value


class Device(TorchDispatchMode):
    """The device is there inside; outside, tensors on it cannot be computed with.

    Attributes:
        clock: How many operations have been called.
        events: What was not done on the device alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0
        self.events: list[Event] = []

    def __enter__(self) -> "Device":
        # `torch.tensor(values, device=...)` is then seen here: values on the CPU, and a copy.
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        entered: Device = super().__enter__()
        return entered

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.clock += 1
        operation = func.overloadpacket
        tensors: list[Tensor] = []

        def unwrapped(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor.inner if isinstance(tensor, MadeUp) else tensor

        plain_args = _mapped(unwrapped, args)
        plain_kwargs = {key: _mapped(unwrapped, value) for key, value in (kwargs or {}).items()}
        ours = [each for each in tensors if isinstance(each, MadeUp)]
        given = plain_kwargs.get("device")
        target = None if given is None else torch.device(given).type
        if target == "meta" or any(each.is_meta for each in tensors):
            return func(*plain_args, **plain_kwargs)
        if operation is aten.copy_:
            to_device = isinstance(args[0], MadeUp)
        else:
            to_device = target == NAME or (target is None and bool(ours))
        moves = operation in (aten._to_copy, aten.copy_)
        strange = [t for t in tensors if not isinstance(t, MadeUp) and (moves or t.dim())]
        if ours and strange and not moves and operation not in INDEXING:
            # Numbers on the CPU go with tensors anywhere, and so do indices; others do not.
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {NAME} and cpu in {func}"
            )
        masked = operation in INDEXING and any(
            isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1]
        )
        read = bool(ours) and (operation in READS or masked or not to_device)
        if read:
            self._note("read", func, self.clock - max(each.born for each in ours))
        elif to_device and strange:
            self._note("upload", func)
        if given is not None:
            plain_kwargs["device"] = torch.device("cpu")
        out = FUSED.get(operation, func)(*plain_args, **plain_kwargs)
        if not to_device:
            if not read and isinstance(out, (Tensor, tuple, list)):
                self._note("cpu", func)
            return out
        wrapped = _mapped(lambda each: MadeUp(each, self.clock), out)
        if not ours or all(each.alias_info is None for each in func._schema.returns):
            return wrapped
        return return_and_correct_aliasing(func, args, kwargs or {}, wrapped)

    def _note(self, kind: str, func: Any, age: int = 0) -> None:
        self.events.append(Event(kind, str(func), age))


def _lstm_cell(x: Tensor, h: Tensor, c: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    gates = sum((each for each in biases if each is not None), x + h)
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * c + i * g
    return o * new.tanh(), new, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(
    gh: Tensor | None, gc: Tensor | None, c: Tensor, new: Tensor, gates: Tensor, biased: bool
) -> tuple[Tensor | None, ...]:
    i, f, g, o = gates.chunk(4, 1)
    gh, gc = torch.zeros_like(c) if gh is None else gh, torch.zeros_like(c) if gc is None else gc
    t = new.tanh()
    gc = gc + gh * o * (1 - t**2)
    parts = [gc * g * i * (1 - i), gc * c * f * (1 - f), gc * i * (1 - g**2), gh * t * o * (1 - o)]
    back = torch.cat(parts, 1)
    return back, gc * f, back.sum(0) if biased else None


def _gru_cell(x: Tensor, h: Tensor, state: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    x, h = (t if b is None else t + b for t, b in zip((x, h), biases or (None, None), strict=True))
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), h.chunk(3, 1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return n + z * (state - n), torch.cat([r, z, n, state, hn], 1)


def _gru_cell_backward(g: Tensor, kept: Tensor, biased: bool) -> tuple[Tensor | None, ...]:
    r, z, n, state, hn = kept.chunk(5, 1)
    gn = g * (1 - z) * (1 - n**2)
    gr, gz = gn * hn * r * (1 - r), g * (state - n) * z * (1 - z)
    gx, gh = torch.cat([gr, gz, gn], 1), torch.cat([gr, gz, gn * r], 1)
    return gx, gh, g * z, *((gx.sum(0), gh.sum(0)) if biased else (None, None))


FUSED = {
    aten._thnn_fused_lstm_cell: _lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl: _lstm_cell_backward,
    aten._thnn_fused_gru_cell: _gru_cell,
    aten._thnn_fused_gru_cell_backward: _gru_cell_backward,
}
"""What PyTorch calls on such a device, and the CPU does not have."""


class _Module(_DummyBackendModule):
    """`torch.made_up`: its random numbers are those of the CPU."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)


def move(model: nn.Module) -> nn.Module:
    """Put a model's parameters and buffers on the device, in place; what is shared stays so."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(
                        parameter.detach().to(NAME), parameter.requires_grad
                    )
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(NAME)
    return model


def register() -> None:
    """Make the device known to this process."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
