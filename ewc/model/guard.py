"""Runs a model in eval mode, and restores whatever the runs change.

Restored are train and eval flags, buffers, parameters, attributes, gradients and gradient hooks.
"""

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ewc.processes.layout import local


class Guard:
    """Keeps a model in eval mode from `prepare` to `leave`; then it is as it was before.

    The `training` flags are assigned directly, module by module: a module may override `train`, to
    merge weights for instance, so that calling it would change more than the flag.

    Args:
        model: The model. A module that is added meanwhile is removed again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._namespaces: list[tuple[dict[str, Any], dict[str, Any]]] = []
        parameters = list(model.parameters())
        # A forward pass may write to buffers. It writes to a parameter only in an embedding with
        # `max_norm`, which rescales its rows in place.
        self._snapshots = []
        for module in self._modules:
            writable = list(module.buffers(recurse=False))
            if getattr(module, "max_norm", None) is not None:
                writable += module.parameters(recurse=False)
            if writable:
                self._snapshots.append(_Snapshot(writable))
        self._flags = [(module, module.training) for module in self._modules]
        self._parameters = [
            (each, each.requires_grad, each.grad, each._backward_hooks) for each in parameters
        ]
        self._module_hooks = [
            (hooks, dict(hooks))
            for module in self._modules
            for name, hooks in vars(module).items()
            if name.startswith("_") and "_hooks" in name and isinstance(hooks, dict)
        ]

    def prepare(self) -> None:
        """Put the model into eval mode, without gradients and gradient hooks."""
        for module in self._modules:
            module.training = False
        for parameter, _, _, hooks in self._parameters:
            parameter.grad = None
            # Gradient hooks belong to training: they could change gradients, or step an optimizer.
            if hooks:
                parameter._backward_hooks = None
        self._namespaces = [
            (namespace, dict(namespace))
            for module in self._modules
            for namespace in (
                module.__dict__,
                module._buffers,
                module._parameters,
                module._modules,
            )
            if isinstance(namespace, dict)  # not those of a scripted module, which are read-only
        ]

    def leave(self) -> None:
        """Restore the model to what it was when this was made; it may be called several times."""
        try:
            self.restore()
            for snapshot in self._snapshots:
                snapshot.restore_by_value()
        finally:
            for module, training in self._flags:
                module.training = training
            for hooks, saved in self._module_hooks:
                _restore(hooks, saved)
            for parameter, requires_grad, gradient, backward_hooks in self._parameters:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
                if parameter._backward_hooks is not backward_hooks:
                    parameter._backward_hooks = backward_hooks

    def restore(self) -> None:
        """Undo what the last run changed, so that every run starts from the same model."""
        for namespace, saved in self._namespaces:
            _restore(namespace, saved)
        for snapshot in self._snapshots:
            snapshot.restore_by_version()
        for parameter, *_ in self._parameters:
            parameter.grad = None


def _restore(namespace: dict[Any, Any], saved: dict[Any, Any]) -> None:
    if namespace.keys() != saved.keys() or not all(map(is_, namespace.values(), saved.values())):
        namespace.clear()
        namespace.update(saved)


class _Snapshot:
    """The values that some tensors of one module had when this was made.

    Every write in place increases a tensor's version, so that comparing versions finds most
    changes without reading values from an accelerator. Batch norm updates its running statistics
    without a new version; in train mode it also increases `num_batches_tracked`, whose version
    does change.

    Args:
        tensors: The tensors of the module that a forward pass may write to.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._values = [tensor.detach().clone() for tensor in tensors]
        self._versions = [tensor._version for tensor in tensors]

    def restore_by_version(self) -> None:
        """Restore the values if one of the tensors has a new version."""
        if any(map(_has_new_version, self._tensors, self._versions)):
            self.restore_by_value()

    def restore_by_value(self) -> None:
        """Restore each tensor that has a new version, or other values."""
        with torch.no_grad():
            for index, (tensor, value) in enumerate(zip(self._tensors, self._values, strict=True)):
                if _has_new_version(tensor, self._versions[index]) or _differs(tensor, value):
                    tensor.copy_(value)
                    self._versions[index] = tensor._version


def _has_new_version(tensor: Tensor, version: int) -> bool:
    return tensor._version != version


def _differs(tensor: Tensor, value: Tensor) -> bool:
    """Whether the values differ; only for dense tensors, such as batch norm's statistics."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    return not torch.equal(local(tensor), local(value))
