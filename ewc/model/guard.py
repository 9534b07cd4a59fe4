"""Runs a model in eval mode, and restores whatever the runs change.

Restored are train and eval flags, buffers, parameters, attributes with the dicts, lists and sets in
them, gradients and gradient hooks.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ewc.model.attributes import Attributes
from ewc.processes.layout import local


class Guard:
    """Keeps a model in eval mode from `prepare` to `leave`; then it is as it was before.

    The `training` flags are assigned directly, module by module: a module may override `train`, to
    merge weights for instance, so that calling it would change more than the flag.

    Args:
        model: The model. A module that is added meanwhile is removed again.
        others: Other modules that the code of a collection may run, guarded in the same way.
    """

    def __init__(self, model: nn.Module, others: Iterable[nn.Module] = ()) -> None:
        modules = [module for outer in (model, *others) for module in outer.modules()]
        self._modules = list(dict.fromkeys(modules))
        self._attributes: Attributes | None = None
        parameters = list(
            dict.fromkeys(each for module in self._modules for each in module.parameters(False))
        )
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
        # A module has a dozen dicts of hooks, and nearly all are empty.
        self._hooks: list[dict[object, object]] = [
            hooks
            for module in self._modules
            for name, hooks in vars(module).items()
            if name.startswith("_") and "_hooks" in name and isinstance(hooks, dict)
        ]
        self._hooks_before = _copies(self._hooks)
        self._hooks_in_runs: dict[int, dict[object, object]] = {}

    def prepare(self) -> None:
        """Put the model into eval mode, without gradients and gradient hooks."""
        for module in self._modules:
            module.training = False
        for parameter, _, _, hooks in self._parameters:
            parameter.grad = None
            # Gradient hooks belong to training: they could change gradients, or step an optimizer.
            if hooks:
                parameter._backward_hooks = None
        # With those that gather sharded parameters, which are there for all runs.
        self._hooks_in_runs = _copies(self._hooks)
        self._attributes = Attributes(self._modules)
        if self._attributes.tensors:
            self._snapshots.append(_Snapshot(self._attributes.tensors))

    def leave(self) -> None:
        """Restore the model to what it was when this was made; it may be called several times."""
        try:
            self.restore()
            if self._attributes is not None:
                self._attributes.restore_originals()
            for snapshot in self._snapshots:
                snapshot.restore_by_value()
        finally:
            for module, training in self._flags:
                module.training = training
            for hooks in self._hooks:
                before = self._hooks_before.get(id(hooks), {})
                if hooks != before:
                    hooks.clear()
                    hooks.update(before)
            for parameter, requires_grad, gradient, backward_hooks in self._parameters:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
                if parameter._backward_hooks is not backward_hooks:
                    parameter._backward_hooks = backward_hooks

    def restore(self) -> None:
        """Undo what the last run changed, so that every run starts from the same model."""
        if self._attributes is not None:
            self._attributes.restore()
        for snapshot in self._snapshots:
            snapshot.restore_by_version()
        for parameter, *_ in self._parameters:
            parameter.grad = None
        # A model may register hooks in its first run, and note it in an attribute, restored above.
        for hooks in filter(None, self._hooks):
            known = self._hooks_in_runs.get(id(hooks), {})
            for key in [key for key in hooks if key not in known and not _is_ours(hooks[key])]:
                del hooks[key]

    def empty_caches(self, run: Callable[[], object]) -> None:
        """Empty caches of what is made of parameters: see `Attributes.empty_caches`."""
        if self._attributes is not None:
            self._attributes.empty_caches(run)
        self.restore()


def _copies(dicts: Iterable[dict[object, object]]) -> dict[int, dict[object, object]]:
    """Copies of those that are not empty, by identity."""
    return {id(each): dict(each) for each in dicts if each}


def _is_ours(hook: object) -> bool:
    """Whether the library itself has registered a hook, for the time of a collection."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "ewc"


class _Snapshot:
    """The values that some tensors of one module had when this was made.

    Every write in place increases a tensor's version, so that comparing versions finds most
    changes without reading values from an accelerator. Batch norm updates its running statistics
    without a new version; in train mode it also increases `num_batches_tracked`, whose version
    does change.

    Args:
        tensors: The tensors of the module that a forward pass may write to.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # Outside of inference mode nothing can write to an inference tensor.
        self._tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        self._values = [tensor.detach().clone() for tensor in self._tensors]
        self._versions = [tensor._version for tensor in self._tensors]

    def restore_by_version(self) -> None:
        """Restore the values if one of the tensors has a new version."""
        if any(map(_has_new_version, self._tensors, self._versions)):
            self.restore_by_value()

    def restore_by_value(self) -> None:
        """Restore each tensor that has a new version, or other values."""
        with torch.no_grad():
            for index, (tensor, value) in enumerate(zip(self._tensors, self._values, strict=True)):
                if _has_new_version(tensor, self._versions[index]) or _differs(tensor, value):
                    if not tensor.is_leaf:  # what a run has written to it has a graph
                        tensor.detach_()
                    tensor.copy_(value)
                    self._versions[index] = tensor._version


def _has_new_version(tensor: Tensor, version: int) -> bool:
    return tensor._version != version


def _differs(tensor: Tensor, value: Tensor) -> bool:
    """Whether the values differ; only for dense tensors, such as batch norm's statistics."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    return not torch.equal(local(tensor), local(value))
