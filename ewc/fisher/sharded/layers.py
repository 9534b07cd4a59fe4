"""A sharded model, run as if it were whole.

`fully_shard` gathers a layer's parameters before it is used and lets them go afterwards, and its
hooks do not work inside `vmap`. Here the same is done for a collection: the hooks of
`fully_shard` and of tensor parallelism are set aside, and each layer is gathered for its forward
pass, and again when the reverse pass comes to it. Its squares are added up over the processes as
soon as that has left it. So no process ever holds more than a layer whole.

Several processes gather together, so they must go through the layers in the same order; before
each gathering they meet, and none is left waiting for another that has failed.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import Self

from ewc import _vmap
from ewc.processes.layout import fsdp_states, is_sharded, local
from ewc.processes.ranks import Ranks

_PARALLEL = ("torch.distributed.fsdp", "torch.distributed.tensor")
"""Where the hooks are defined that gather parameters, or turn inputs into DTensors."""


@dataclass
class _Weight:
    """One parameter, and what stands in its place.

    Attributes:
        parameter: The model's own, sharded or not.
        stand_in: What the model runs on: whole while its layer is gathered, else without memory.
        away: What `stand_in` holds then; NaN, so that no use goes unnoticed.
        places: The modules that hold the parameter, and the key under which each does.
        name: Its name, if it is collected.
        total: The sum of its squares in this run, whole, once there are any.
    """

    parameter: nn.Parameter
    stand_in: nn.Parameter
    away: Tensor
    places: list[tuple[nn.Module, str]]
    name: str | None
    total: Tensor | None = None


@dataclass(eq=False)
class _Layer:
    """Parameters that are gathered together.

    Attributes:
        name: The name of its (first) module.
        weights: Its parameters.
        inputs: The dtype that inputs are cast to, as its mixed precision says.
        outputs: The dtype that outputs are cast to.
        depth: How many of its modules are running.
        gathered: Whether the stand-ins hold the whole parameters.
    """

    name: str
    weights: list[_Weight]
    inputs: torch.dtype | None = None
    outputs: torch.dtype | None = None
    depth: int = 0
    gathered: bool = False


class _Piece(NamedTuple):
    """What autograd keeps of a gathered parameter: where it was, not what."""

    layer: _Layer
    weight: _Weight
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class ShardedModel:
    """Runs a sharded model whole, one layer at a time; a context manager.

    Args:
        model: The model; some of its parameters are `DTensor`s.
        parameters: Those to collect, by name.
        ranks: The processes that run it together.

    Attributes:
        parameters: By name, what to differentiate by in place of each.
        finite: By name, whether all squares of this process's own samples were finite so far.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], ranks: Ranks
    ) -> None:
        self._model = model
        self._protected = parameters
        self._ranks = ranks
        self._stack = ExitStack()
        self._current: _Layer | None = None
        self._storages: dict[int, tuple[_Layer, _Weight]] = {}
        self._unsharded = {
            name: _Weight(p, p, p.detach(), [], name)
            for name, p in parameters.items()
            if not is_sharded(p)
        }
        self._layers: list[_Layer] = []
        self.parameters: dict[str, nn.Parameter] = dict(parameters)
        self.assume_finite()

    @property
    def stand_ins(self) -> set[str]:
        """The names of those that something else stands in for."""
        return self.parameters.keys() - self._unsharded.keys()

    def assume_finite(self) -> None:
        """Forget which squares were not finite."""
        self.finite = {name: torch.tensor(True) for name in self._protected}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for module, _ in fsdp_states(self._model):
                module.reshard()  # type: ignore[operator]
            modules = self._divide()
            for module in self._model.modules():
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    stack.callback(_put_back, hooks, copy.copy(hooks))
                    for key in [key for key, hook in hooks.items() if _is_parallel(hook)]:
                        del hooks[key]
            for (module, layer), casts in modules.items():
                entering, leaving = self._hooks(layer, casts)
                stack.callback(
                    module.register_forward_pre_hook(
                        entering, prepend=True, with_kwargs=True
                    ).remove
                )
                stack.callback(module.register_forward_hook(leaving).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self.reset()

    def reset(self) -> None:
        """Let go of what a run, perhaps broken off, still holds."""
        self._current = None
        for layer in self._layers:
            layer.depth = 0
            if layer.gathered:
                self._let_go(layer)

    @contextmanager
    def adding_to(
        self, target: Mapping[str, Tensor], counts: bool
    ) -> Iterator[Mapping[str, Tensor]]:
        """Add up the squares of a run over all processes.

        Args:
            target: For each parameter, where this process's part is added.
            counts: Whether this process's samples count. Those that it runs through only because
                others still have some do not.

        Yields:
            For each parameter, where the squares of this process's samples are to be added, whole.
        """
        weights = [weight for layer in self._layers for weight in layer.weights]
        by_name = {w.name: w for w in (*weights, *self._unsharded.values()) if w.name is not None}
        self._target, self._counts = target, counts
        try:
            yield _Totals(by_name)
            for layer in self._layers:
                self._add_up(layer)
            for weight in self._unsharded.values():
                if weight.total is not None and counts and weight.name is not None:
                    self._look_at(weight.name, weight.total)
                    target[weight.name].add_(weight.total)
        finally:
            self.reset()
            for weight in by_name.values():
                weight.total = None

    def _divide(self) -> dict[tuple[nn.Module, _Layer], bool]:
        """Divide the model into layers: as `fully_shard` did, else module by module.

        Returns:
            The modules that need a layer when they are called, and whether they cast for it.
        """
        names = {module: name for name, module in self._model.named_modules()}
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in names:
            for key, parameter in module._parameters.items():
                places.setdefault(id(parameter), []).append((module, key))
        modules: dict[tuple[nn.Module, _Layer], bool] = {}
        taken: set[int] = set()
        for module, state in fsdp_states(self._model):
            if module is not state._modules[0]:
                continue
            policy = state._mp_policy
            sharded = [p.sharded_param for g in state._fsdp_param_groups for p in g.fsdp_params]
            layer = _Layer(
                names[module],
                [self._weight(p, places[id(p)], policy.param_dtype) for p in sharded],
                policy.param_dtype if policy.cast_forward_inputs else None,
                policy.output_dtype,
            )
            taken.update(map(id, sharded))
            modules.update(((one, layer), True) for one in state._modules)
            self._layers.append(layer)
        for module, name in names.items():
            own = [p for p in module._parameters.values() if p is not None and is_sharded(p)]
            own = [p for p in own if id(p) not in taken]
            if own:
                weights = [self._weight(p, places[id(p)], None) for p in own]
                layer = _Layer(name, weights)
                taken.update(map(id, own))
                self._layers.append(layer)
        # Checkpointing runs a part of a layer again, past the module that it was gathered for.
        for layer in self._layers:
            for module, _ in chain.from_iterable(weight.places for weight in layer.weights):
                modules.setdefault((module, layer), False)
        return modules

    def _weight(
        self, parameter: nn.Parameter, places: list[tuple[nn.Module, str]], dtype: Any
    ) -> _Weight:
        dtype = parameter.dtype if dtype is None else dtype
        device = parameter.device_mesh.device_type  # type: ignore[attr-defined]
        away = torch.full((), torch.nan, dtype=dtype, device=device).expand(parameter.shape)
        stand_in = nn.Parameter(away, requires_grad=parameter.requires_grad)
        name = next((name for name, p in self._protected.items() if p is parameter), None)
        if name is not None:
            self.parameters[name] = stand_in
        return _Weight(parameter, stand_in, away, places, name)

    # Forward.

    def _hooks(self, layer: _Layer, casts: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def entering(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if not layer.gathered:
                self._gather(layer)
            if layer.depth == 0:
                for weight in layer.weights:
                    for holder, key in weight.places:
                        holder._parameters[key] = weight.stand_in
            layer.depth += 1
            return _cast((args, kwargs), layer.inputs if casts else None)

        def leaving(module: nn.Module, args: Any, output: Any) -> Any:
            layer.depth -= 1
            if layer.depth == 0:
                for weight in layer.weights:
                    for holder, key in weight.places:
                        holder._parameters[key] = weight.parameter
                if layer is not self._current:
                    self._let_go(layer)
            return _cast(output, layer.outputs if casts else None)

        return entering, leaving

    def _gather(self, layer: _Layer) -> None:
        with _outside():
            self._ranks.barrier(f"the parameters of {layer.name!r}")
            for weight in layer.weights:
                weight.stand_in.data = _gathered(weight.parameter, weight.away)
                storage = weight.stand_in.data.untyped_storage()
                self._storages[storage._cdata] = layer, weight
        layer.gathered = True

    def _let_go(self, layer: _Layer) -> None:
        with _outside():
            for weight in layer.weights:
                self._storages.pop(weight.stand_in.data.untyped_storage()._cdata, None)
                weight.stand_in.data = weight.away
        layer.gathered = False

    # Reverse.

    def _pack(self, tensor: Tensor) -> Any:
        if type(tensor) not in (Tensor, nn.Parameter):
            return tensor  # a subclass may have no memory of its own
        found = self._storages.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor
        return _Piece(*found, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Piece):
            kept: Tensor = packed
            return kept
        if not packed.layer.gathered:
            if self._current is not None:
                self._add_up(self._current)
                self._let_go(self._current)
            self._gather(packed.layer)
            self._current = packed.layer
        return packed.weight.stand_in.data.as_strided(packed.size, packed.stride, packed.offset)

    def _add_up(self, layer: _Layer) -> None:
        """Add the squares of a layer up over the processes, to the part that each one holds."""
        found = [(w, w.total) for w in layer.weights if w.total is not None]
        if not found:
            return
        from torch.distributed.tensor import DTensor, Partial, Replicate

        with _outside():
            self._ranks.barrier(f"the squares of {layer.name!r}")
            for weight, total in found:
                weight.total = None
                assert weight.name is not None
                if self._counts:
                    self._look_at(weight.name, total)
                mesh = weight.parameter.device_mesh  # type: ignore[attr-defined]
                summands = total if self._counts else total.zero_()
                groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
                start = [
                    Partial() if self._ranks.shards_data_over(g) else Replicate() for g in groups
                ]
                spread = DTensor.from_local(summands, mesh, start, run_check=False)
                spread = spread.redistribute(mesh, weight.parameter.placements)  # type: ignore[attr-defined]
                part = local(self._target[weight.name])
                part.add_(local(spread).to(part.device))

    def _look_at(self, name: str, total: Tensor) -> None:
        self.finite[name] = self.finite[name].to(total.device) & total.sum().isfinite()


class _Totals(Mapping[str, Tensor]):
    """For each parameter a whole sum of squares, made when it is first asked for."""

    def __init__(self, weights: Mapping[str, _Weight]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        if weight.total is None:
            real = weight.parameter.dtype.to_real()
            weight.total = torch.zeros(
                weight.parameter.shape,
                dtype=torch.promote_types(real, torch.float32),
                device=weight.stand_in.device,
            )
        return weight.total

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _gathered(parameter: nn.Parameter, like: Tensor) -> Tensor:
    """All of a sharded parameter, contiguous, in the dtype and on the device of `like`."""
    from torch.distributed.tensor import DTensor

    part = local(parameter.detach()).to(like.device, like.dtype)
    full: Tensor = DTensor.from_local(
        part,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()
    # A copy where there was nothing to gather: the model must not write into the user's memory.
    return full.clone() if full.data_ptr() == part.data_ptr() else full.contiguous()


@contextmanager
def _outside() -> Iterator[None]:
    """Step out of `vmap`, of all that watches functions, and of autograd."""
    with ExitStack() as stack:
        stack.enter_context(_vmap.outside())
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.no_grad())
        yield


def _is_parallel(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # functools.partial
    return str(getattr(function, "__module__", "")).startswith(_PARALLEL)


def _put_back(hooks: dict[int, Any], kept: dict[int, Any]) -> None:
    hooks.clear()
    hooks.update(kept)


def _cast(tree: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return tree
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)
