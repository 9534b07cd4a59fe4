"""Functions of PyTorch that act otherwise while a collection runs a model.

A `TorchFunctionMode` sees neither of these:

- *Activation checkpointing* drops activations and computes them again in the reverse pass, for
  which `vmap` has no way; the reentrant kind also hides parameters from `torch.autograd.grad`. A
  collection runs a part of a batch at a time, so the function is simply called.
- An *`autograd.Function` of the old style*, without `setup_context`, is refused inside `vmap`
  before anything is called. `Function.apply` sends it on as those of the new style
  are, so that the mode sees it.

The replacements act in the threads that are inside `replaced`; other threads get the originals.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch._functorch.autograd_function import custom_function_call
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointFunction

from ewc.fisher.switches import Switch


def _acts() -> bool:
    return replaced.holds > 0


_ORIGINAL = vars(Function).get("apply")  # None from PyTorch 2.14 on, where it is inherited
_NAME = "_checkpoint_without_reentrant_generator"
if hasattr(torch.utils.checkpoint, f"{_NAME}_impl"):  # from PyTorch 2.14 on
    _NAME += "_impl"
_checkpoint: Callable[..., Iterator[None]] = getattr(torch.utils.checkpoint, _NAME)


def _apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`Function.apply`, which sends a function of the old style on too."""
    is_old = cls.setup_context is Function.setup_context
    if is_old and _acts() and torch._C._are_functorch_transforms_active():
        return custom_function_call(cls, *args, **kwargs)
    original: Any = super(Function, cls) if _ORIGINAL is None else _ORIGINAL.__get__(None, cls)
    return original.apply(*args, **kwargs) if _ORIGINAL is None else original(*args, **kwargs)


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
    return super(CheckpointFunction, cls).apply(function, preserve, *args)


def _install() -> None:
    setattr(Function, "apply", classmethod(_apply_function))  # noqa: B010 - of a class of PyTorch
    setattr(CheckpointFunction, "apply", classmethod(_apply))  # noqa: B010 - of a class of PyTorch
    for module in _checkpointing():
        setattr(module, _NAME, _without_checkpoint)


def _remove() -> None:
    if _ORIGINAL is not None:
        setattr(Function, "apply", _ORIGINAL)  # noqa: B010
    elif "apply" in vars(Function):
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
