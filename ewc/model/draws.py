"""Random numbers drawn from generators of one's own, where a model asks for the global ones."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

_FILLS: dict[Any, str] = {
    aten.rand_like: "uniform_",
    aten.randn_like: "normal_",
    aten.randint_like: "random_",
}
"""How to fill what these make, where their version of PyTorch gives them no generator."""

_SHARES = ("p", "dropout", "dropout_p")
"""The arguments of fused operations that draw only if this share of something is dropped."""


class Draws(TorchDispatchMode):
    """Gives generators to the random operations that were given none. See `Drawing`.

    Args:
        generators: A generator for each device.
        in_place: Puts states of them in the place of the global ones, for an operation to which
            PyTorch gives no generator, such as attention with dropout.

    Attributes:
        seen: Whether there was such an operation.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        in_place: Callable[[list[Tensor]], AbstractContextManager[Callable[[], list[Tensor]]]],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False
        self._generators = {each.device: each for each in generators}
        self._in_place = in_place

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators."""
        return list(self._generators.values())

    def states(self) -> list[Tensor]:
        """The states of the generators."""
        return [each.get_state() for each in self._generators.values()]

    def set_states(self, states: Sequence[Tensor]) -> None:
        """Set the states of the generators."""
        for generator, state in zip(self._generators.values(), states, strict=True):
            generator.set_state(state)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Perform one operation."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*_with_tensor(func, args), **kwargs)
        position, seeded = _seeded(func)
        own = args[position] if position < len(args) else kwargs.get("generator")
        generator = self._generators.get(_device(args, kwargs))
        is_given = own is not None and not _is_default(own)
        if is_given or generator is None or _drops_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        self.seen = True
        if seeded is not None:
            return seeded(*args[:position], **{**kwargs, "generator": generator})
        if func.overloadpacket in _FILLS:
            return _filled(func, args, kwargs, generator)
        with self._in_place(self.states()) as states:
            found = func(*args, **kwargs)
            self.set_states(states())
        return found


class Drawing(TorchFunctionMode):
    """A context in which each call of a function of PyTorch gets its random numbers by `Draws`.

    `Draws` is not active for the whole context, because some tensors of subclasses, such as
    `torch.nn.attention.bias.CausalBias`, cannot be made under a dispatch mode. It is pushed onto
    the stack of modes, because `with` would set flags of the whole process.
    """

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self._draws = draws

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Perform one call."""
        _push_mode(self._draws)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            _pop_mode()


_WIDE = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


def _with_tensor(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with a tensor for a number that is the only tensor of an operation.

    PyTorch hands modes a Python number for a tensor that was made of one, and refuses the number
    where an operation such as `clone` takes a tensor alone.
    """
    if args and type(args[0]) in _WIDE and _takes_one_tensor(func):
        return torch.tensor(args[0], dtype=_WIDE[type(args[0])]), *args[1:]
    return args


def _is_default(generator: Any) -> bool:
    """Whether a generator is the CPU's default one: PyTorch hands modes another object for it."""
    default: Any = torch.default_generator
    return bool(generator._cdata == default._cdata)


@cache
def _takes_one_tensor(func: Any) -> bool:
    kinds = [str(argument.type) for argument in func._schema.arguments]
    return kinds[0] == "Tensor" and kinds.count("Tensor") == 1


@cache
def _seeded(func: Any) -> tuple[int, Any]:
    """The position of the generator, and the overload that takes one, or None."""
    names = _names(func)
    if "generator" in names:
        return names.index("generator"), func
    packet = func.overloadpacket
    for other in (getattr(packet, name) for name in packet.overloads()):
        if [name for name in _names(other) if name != "generator"] == names != _names(other):
            return len(names), other
    return len(names), None


def _names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The device on which an operation draws: where it makes a tensor, or where its tensors lie."""
    if kwargs.get("device") is not None:
        return torch.empty(0, device=kwargs["device"]).device  # with its index
    tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")


def _drops_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = {**dict(zip(_names(func), args, strict=False)), **kwargs}
    if "generator" in _names(func):
        return False
    shares = [given.get(name, 0) for name in _names(func) if name in _SHARES]
    return bool(shares) and (not any(shares) or given.get("train") is False)


def _filled(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], generator: torch.Generator
) -> Tensor:
    like, *bounds = args
    found: Tensor = torch.empty_like(like, **kwargs)
    limits = [0, *bounds] if len(bounds) == 1 else bounds
    filled: Tensor = getattr(found, _FILLS[func.overloadpacket])(*limits, generator=generator)
    return filled
