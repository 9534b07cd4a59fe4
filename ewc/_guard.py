"""Leaves a model as it was found: flags, buffers, parameters, attributes, gradients."""

from typing import Any

import torch
from torch import nn
from typing_extensions import Self


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
        writable = list(self._model.buffers()) + [
            parameter
            for module in modules
            if getattr(module, "max_norm", None) is not None
            for parameter in module.parameters(recurse=False)
        ]
        self._values = [(tensor, tensor.detach().clone()) for tensor in writable]
        self._versions = [tensor._version for tensor in writable]
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
            # Batch norm writes its statistics without counting a version.
            with torch.no_grad():
                for tensor, value in self._values:
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)
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
            if space.keys() != kept.keys() or any(space[key] is not kept[key] for key in kept):
                space.clear()
                space.update(kept)
        with torch.no_grad():
            for place, (tensor, value) in enumerate(self._values):
                if tensor._version != self._versions[place]:
                    tensor.copy_(value)
                    self._versions[place] = tensor._version
        for parameter, _ in self._gradients:
            parameter.grad = None
