"""Runs a sharded model as if it were whole.

The hooks of `fully_shard`, which gather a layer before it is used and release it afterwards, do
not work inside `vmap`. During a collection they are replaced: each layer is gathered for its
forward pass, and again when the reverse pass comes to it. Its squares are added up over the
processes as soon as the reverse pass comes to another layer. So a process holds the whole values
of one layer at a time, and in the forward pass those of the layers around it.

Gathering is a collective, so all processes must gather the same layers in the same order. Each
gathering is an exchange behind a barrier, so that none waits for another that has failed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ewc.fisher.sharded.layers import Call, Layer, Placeholder, divide, outside_modes
from ewc.processes.layout import fsdp_states, is_sharded
from ewc.processes.ranks import Ranks

_PARALLEL = ("torch.distributed.fsdp", "torch.distributed.tensor")
"""Where the hooks are defined that gather parameters, or turn inputs into DTensors."""


class _Saved(NamedTuple):
    """What autograd saves of a gathered parameter: which part of it, not the values."""

    layer: Layer
    placeholder: Placeholder
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class ShardedModel:
    """Runs a sharded model, gathering one layer at a time, between `prepare` and `reset`.

    Args:
        model: The model; some of its parameters are `DTensor`s.
        parameters: The parameters to collect, by name.
        ranks: The processes that run it.

    Attributes:
        parameters: The parameters by name, each sharded one replaced by its placeholder.
        placeholder_names: The names of the parameters that have a placeholder.
        finite: Whether all squares of this process's own samples were finite so far, by
            parameter.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], ranks: Ranks
    ) -> None:
        self.parameters: dict[str, nn.Parameter] = dict(parameters)
        self.placeholder_names = frozenset(name for name, p in parameters.items() if is_sharded(p))
        self._model = model
        self._protected = parameters
        self._ranks = ranks
        self._whole = [
            Placeholder.of_whole(p, name) for name, p in parameters.items() if not is_sharded(p)
        ]
        self._layers: list[Layer] = []
        for module, _ in fsdp_states(model):
            module.reshard()  # type: ignore[operator]
        self._in_reverse: Layer | None = None
        self._storages: dict[int, tuple[Layer, Placeholder]] = {}
        self._sums: Mapping[str, Tensor] = {}
        self._is_counted = True
        self.assume_finite()

    def assume_finite(self) -> None:
        """Assume again that all squares are finite."""
        self.finite = {name: torch.tensor(True) for name in self._protected}

    def prepare(self) -> None:
        """Replace the hooks of `fully_shard` by those that gather placeholders.

        The caller puts back the modules' hooks, and resets this, however the runs end.
        """
        self._layers, calls = divide(self._model, self._protected)
        for layer in self._layers:
            for each in layer.placeholders:
                if each.name is not None:
                    self.parameters[each.name] = each.parameter
        modules = self._model.modules()
        for hooks in (hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)):
            for key in [key for key, hook in hooks.items() if _is_parallel(hook)]:
                del hooks[key]
        for call in calls:
            before, after = self._hooks(call)
            call.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
            call.module.register_forward_hook(after)

    def saved_tensors_hooks(self) -> AbstractContextManager[Any]:
        """A context for all runs, in which autograd saves no values of gathered parameters."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def reset(self) -> None:
        """Release all layers that are gathered, after a run that may have been interrupted."""
        self._in_reverse = None
        for layer in self._layers:
            layer.depth = 0
            if layer.is_gathered:
                self._release(layer)

    @contextmanager
    def adding_to(
        self, sums: Mapping[str, Tensor], is_counted: bool
    ) -> Iterator[Mapping[str, Tensor]]:
        """Add up the squares of a run over all processes.

        Args:
            sums: For each parameter, the sum to which this process adds its shard of the squares.
            is_counted: Whether this process's samples count. Samples that it only runs because
                other processes still have some do not count.

        Yields:
            For each parameter a whole sum, to which this process adds the squares of its samples.
        """
        sharded = [each for layer in self._layers for each in layer.placeholders]
        by_name = {s.name: s for s in (*sharded, *self._whole) if s.name is not None}
        self._sums, self._is_counted = sums, is_counted
        try:
            yield _SumsOnDemand(by_name)
            for layer in self._layers:
                self._add_up(layer)
            for each in self._whole:
                if each.squares is not None and is_counted and each.name is not None:
                    self._note_finite(each.name, each.squares)
                    sums[each.name].add_(each.squares)
        finally:
            self.reset()
            for each in by_name.values():
                each.squares = None

    # Forward.

    def _hooks(self, call: Call) -> tuple[Callable[..., Any], Callable[..., Any]]:
        layer = call.layer

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if not layer.is_gathered:
                self._gather(layer)
            if layer.depth == 0:
                layer.put_in()
            layer.depth += 1
            return _cast((args, kwargs), layer.inputs if call.casts else None)

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            layer.depth -= 1
            if layer.depth == 0:
                layer.take_out()
                if layer is not self._in_reverse:
                    self._release(layer)
            return _cast(output, layer.outputs if call.casts else None)

        return before, after

    def _gather(self, layer: Layer) -> None:
        with outside_modes(), self._ranks.exchange(f"the parameters of {layer.name!r}"):
            layer.gather()
        for each in layer.placeholders:
            self._storages[each.parameter.data.untyped_storage()._cdata] = layer, each

    def _release(self, layer: Layer) -> None:
        for each in layer.placeholders:
            self._storages.pop(each.parameter.data.untyped_storage()._cdata, None)
        layer.release()

    # Reverse.

    def _pack(self, tensor: Tensor) -> Any:
        if type(tensor) not in (Tensor, nn.Parameter):
            return tensor  # a subclass may have no memory of its own
        found = self._storages.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor
        return _Saved(*found, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            tensor: Tensor = saved
            return tensor
        if not saved.layer.is_gathered:
            if self._in_reverse is not None:
                self._add_up(self._in_reverse)
                self._release(self._in_reverse)
            self._gather(saved.layer)
            self._in_reverse = saved.layer
        return saved.placeholder.parameter.data.as_strided(saved.size, saved.stride, saved.offset)

    def _add_up(self, layer: Layer) -> None:
        """Add up the squares of a layer over the processes."""
        found = [(each, each.squares) for each in layer.placeholders if each.squares is not None]
        if not found:
            return
        with outside_modes(), self._ranks.exchange(f"the squares of {layer.name!r}"):
            for each, squares in found:
                each.squares = None
                assert each.name is not None
                if self._is_counted:
                    self._note_finite(each.name, squares)
                else:
                    squares.zero_()
                each.add_own_part(squares, self._ranks, self._sums[each.name])

    def _note_finite(self, name: str, squares: Tensor) -> None:
        self.finite[name] = self.finite[name].to(squares.device) & squares.sum().isfinite()


class _SumsOnDemand(Mapping[str, Tensor]):
    """For each parameter a whole sum of squares, made when it is first asked for."""

    def __init__(self, placeholders: Mapping[str, Placeholder]) -> None:
        self._placeholders = placeholders

    def __getitem__(self, name: str) -> Tensor:
        placeholder = self._placeholders[name]
        if placeholder.squares is None:
            placeholder.squares = placeholder.zeros()
        return placeholder.squares

    def __iter__(self) -> Iterator[str]:
        return iter(self._placeholders)

    def __len__(self) -> int:
        return len(self._placeholders)


def _is_parallel(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # functools.partial
    return str(getattr(function, "__module__", "")).startswith(_PARALLEL)


def _cast(tree: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return tree
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)
