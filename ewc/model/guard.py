"""Leaves a model as it was found: flags, buffers, parameters, attributes, gradients."""

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ewc.processes.layout import local


class Guard:
    """Puts a model into eval mode, and takes back whatever running it changes.

    The flags are set one by one and directly: a module may override `train`, to merge weights for
    example, and would then change more than the flag.

    Args:
        model: The model; its modules are taken as they are when the guard is entered.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._spaces: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def __enter__(self) -> Self:
        modules = list(self._model.modules())
        parameters = list(self._model.parameters())
        # A forward pass may write to buffers; to parameters only where an embedding keeps the
        # norm of its rows.
        self._kept = []
        for module in modules:
            writable = list(module.buffers(recurse=False))
            if getattr(module, "max_norm", None) is not None:
                writable += module.parameters(recurse=False)
            if writable:
                self._kept.append(_Kept(writable))
        self._flags = [(module, module.training) for module in modules]
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        self._hooks = [
            (parameter, parameter._backward_hooks)
            for parameter in parameters
            if parameter._backward_hooks
        ]
        # Nothing has changed so far: whatever fails above (memory for the copies) leaves no trace.
        try:
            self._set_apart(modules)
        except BaseException:  # Ctrl-C may come between any two lines
            self.__exit__()
            raise
        return self

    def _set_apart(self, modules: list[nn.Module]) -> None:
        for module in modules:
            module.training = False
        # Aside, so that a model that runs backward does not add to them.
        for parameter, _ in self._gradients:
            parameter.grad = None
        # They belong to training: they would change gradients, or even take an optimizer's step.
        for parameter, _ in self._hooks:
            parameter._backward_hooks = None
        self._spaces = [
            (space, dict(space))
            for module in modules
            for space in (module.__dict__, module._buffers, module._parameters, module._modules)
            if isinstance(space, dict)  # scripted modules keep theirs out of reach
        ]

    def __exit__(self, *exception: object) -> None:
        try:
            self._take_back()
        except BaseException:  # again in full, if it was interrupted
            self._take_back()
            raise

    def _take_back(self) -> None:
        try:
            self.restore()
            for kept in self._kept:
                kept.restore_unseen()
        finally:
            for module, training in self._flags:
                module.training = training
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
            for parameter, hooks in self._hooks:
                parameter._backward_hooks = hooks

    def restore(self) -> None:
        """Take back what the last run changed, so that the next one starts from the same."""
        for space, kept in self._spaces:
            if space.keys() != kept.keys() or not all(map(is_, space.values(), kept.values())):
                space.clear()
                space.update(kept)
        for one in self._kept:
            one.restore()
        for parameter, _ in self._gradients:
            parameter.grad = None


class _Kept:
    """Tensors of one module, and the values that they had.

    Writing to a tensor counts its version up, so that nothing need be compared, nor read from an
    accelerator. Batch norm writes its statistics without that; in train mode it also counts its
    batches, which is seen.

    Args:
        tensors: They are taken as they are now.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._values = [tensor.detach().clone() for tensor in tensors]
        self._versions = [tensor._version for tensor in tensors]

    def restore(self) -> None:
        """Take back what has been written, as far as versions tell."""
        if any(map(_is_newer, self._tensors, self._versions)):
            self.restore_unseen()

    def restore_unseen(self) -> None:
        """Take back whatever has been written."""
        with torch.no_grad():
            for place, (tensor, value) in enumerate(zip(self._tensors, self._values, strict=True)):
                if _is_newer(tensor, self._versions[place]) or _differs(tensor, value):
                    tensor.copy_(value)
                    self._versions[place] = tensor._version


def _is_newer(tensor: Tensor, version: int) -> bool:
    return tensor._version != version


def _differs(tensor: Tensor, value: Tensor) -> bool:
    """Whether the values are others, for tensors of the kind that batch norm writes to."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    return not torch.equal(local(tensor), local(value))
