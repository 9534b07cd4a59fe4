"""Functions of PyTorch that act otherwise while a collection runs a model.

A `TorchFunctionMode` sees neither of these:

- *Activation checkpointing* drops activations and computes them again in the reverse pass, for
  which `vmap` has no way; the reentrant kind also hides parameters from `torch.autograd.grad`. A
  collection runs a part of a batch at a time, so the function is simply called.
- An *`autograd.Function` of the old style*, without `setup_context`, is refused inside `vmap`
  before anything is called. It is sent on as those of the new style are, so that the mode sees it.
  From PyTorch 2.14 on only `Function.apply` can be replaced, and a method that was bound before the
  collection, as in `spike = Spike.apply`, is not: such a model goes by the loop.

The replacements act in the threads that are inside `replaced`; other threads get the originals.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch.autograd.function
import torch.utils.checkpoint
from torch._functorch.autograd_function import custom_function_call
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointFunction

from ewc._switches import Switch


def _acts() -> bool:
    return replaced.holds > 0


class _OldStyle:
    """What `Function.apply` is told of a function without `setup_context`, up to PyTorch 2.13.

    It asks twice: whether to bind arguments to the signature of a new-style `forward` (no), and
    inside `vmap` whether the function may be dispatched (yes).
    """

    def __init__(self) -> None:
        self._asked = False

    def __bool__(self) -> bool:
        asked, self._asked = self._asked, True
        return asked


_own_apply: Any = vars(Function).get("apply")
_ASKS = isinstance(_own_apply, classmethod)  # from PyTorch 2.14 on it is C code, and asks nothing
_has_setup_context: Callable[..., bool] = torch.autograd.function._is_setup_context_defined


def _setup_context(fn: Callable[..., Any]) -> object:
    return _has_setup_context(fn) or (_OldStyle() if _acts() else False)


_NAME = "_checkpoint_without_reentrant_generator"
if hasattr(torch.utils.checkpoint, f"{_NAME}_impl"):  # from PyTorch 2.14 on
    _NAME += "_impl"
_checkpoint: Callable[..., Iterator[None]] = getattr(torch.utils.checkpoint, _NAME)


def _apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`Function.apply` from PyTorch 2.14 on, which sends a function of the old style on too."""
    is_old = cls.setup_context is Function.setup_context
    if is_old and _acts() and torch._C._are_functorch_transforms_active():
        return custom_function_call(cls, *args, **kwargs)
    original: Any = super(Function, cls)
    return original.apply(*args, **kwargs)


def _without_checkpoint(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Run around the function of a checkpoint of the kind that is not reentrant."""
    if _acts():
        yield
    else:
        yield from _checkpoint(*args, **kwargs)


def _apply(cls: Any, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    """The function of a reentrant checkpoint, called."""
    if _acts():
        return function(*args)
    original: Any = super(CheckpointFunction, cls)
    return original.apply(function, preserve, *args)


def _install() -> None:
    if _ASKS:
        torch.autograd.function._is_setup_context_defined = _setup_context
    else:
        setattr(Function, "apply", classmethod(_apply_function))  # noqa: B010 - a PyTorch class
    setattr(CheckpointFunction, "apply", classmethod(_apply))  # noqa: B010 - of a class of PyTorch
    for module in _checkpointing():
        setattr(module, _NAME, _without_checkpoint)


def _remove() -> None:
    if _ASKS:
        torch.autograd.function._is_setup_context_defined = _has_setup_context
    elif _own_apply is not None:
        setattr(Function, "apply", _own_apply)  # noqa: B010 - a PyTorch class
    elif "apply" in vars(Function):  # inherited before
        del Function.apply
    if "apply" in vars(CheckpointFunction):
        del CheckpointFunction.apply
    for module in _checkpointing():
        setattr(module, _NAME, _checkpoint)


def _checkpointing() -> list[Any]:
    """The modules that hold the generator by name."""
    names = ("torch.utils.checkpoint", "torch.distributed._composable.checkpoint_activation")
    return [sys.modules[name] for name in names if name in sys.modules]


replaced = Switch(lambda: None, _install, lambda _: _remove())
"""The replacements act in threads inside this context."""
