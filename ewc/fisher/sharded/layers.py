"""The layers of a sharded model: a layer's parameters are gathered in one step.

A layer is what `fully_shard` was applied to, or else a module with sharded parameters. The model
runs on placeholders: ordinary parameters that hold whole values while their layer is gathered, and
no memory otherwise. Gathering is a collective.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from ewc import _vmap
from ewc.processes.layout import fsdp_states, is_sharded, local
from ewc.processes.ranks import Ranks

Holders = list[tuple[nn.Module, str]]
"""The modules that hold a parameter, each with the key under which it does."""


@dataclass(eq=False)
class Placeholder:
    """What the model uses instead of one parameter.

    Attributes:
        original: The model's own parameter, sharded or not.
        parameter: The placeholder; for a parameter that is not sharded, the original.
        released: The values of the placeholder while its layer is not gathered: NaN without memory,
            so that any use by mistake shows.
        holders: The modules that hold the original.
        name: The name of the original, if it is collected.
        squares: The whole sum of its squares in the present run, once there are some.
    """

    original: nn.Parameter
    parameter: nn.Parameter
    released: Tensor
    holders: Holders
    name: str | None
    squares: Tensor | None = None

    @classmethod
    def of_sharded(
        cls, original: nn.Parameter, holders: Holders, name: str | None, dtype: torch.dtype | None
    ) -> "Placeholder":
        """The placeholder of a sharded parameter, in another dtype if one is given."""
        device = original.device_mesh.device_type  # type: ignore[attr-defined]
        nan = torch.full((), torch.nan, dtype=dtype or original.dtype, device=device)
        released = nan.expand(original.shape)
        parameter = nn.Parameter(released, requires_grad=original.requires_grad)
        return cls(original, parameter, released, holders, name)

    @classmethod
    def of_whole(cls, original: nn.Parameter, name: str) -> "Placeholder":
        """A parameter that is not sharded is its own placeholder."""
        return cls(original, original, original.detach(), [], name)

    def gathered(self) -> Tensor:
        """The whole values, contiguous, in the dtype and on the device of the placeholder."""
        from torch.distributed.tensor import DTensor

        part = local(self.original.detach()).to(self.released.device, self.released.dtype)
        whole: Tensor = DTensor.from_local(
            part,
            self.original.device_mesh,  # type: ignore[attr-defined]
            self.original.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=self.original.shape,
            stride=self.original.stride(),
        ).full_tensor()
        # A copy if nothing was gathered: the model must not write into the user's memory.
        return whole.clone() if whole.data_ptr() == part.data_ptr() else whole.contiguous()

    def zeros(self) -> Tensor:
        """A whole sum of squares: real, and at least float32."""
        return torch.zeros(
            self.original.shape,
            dtype=torch.promote_types(self.original.dtype.to_real(), torch.float32),
            device=self.parameter.device,
        )

    def add_own_part(self, squares: Tensor, ranks: Ranks, sums: Tensor) -> None:
        """Sum whole squares over the processes, and add the shard of this process to `sums`."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh = self.original.device_mesh  # type: ignore[attr-defined]
        groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        summands = [Partial() if ranks.shards_data_over(g) else Replicate() for g in groups]
        distributed = DTensor.from_local(squares, mesh, summands, run_check=False)
        distributed = distributed.redistribute(mesh, self.original.placements)  # type: ignore[attr-defined]
        part = local(sums)
        part.add_(local(distributed).to(part.device))


@dataclass(eq=False)
class Layer:
    """Parameters that are gathered in one step.

    Attributes:
        name: The name of its (first) module.
        placeholders: Those of its parameters.
        inputs: The dtype that its mixed precision casts inputs to.
        outputs: The dtype that its mixed precision casts outputs to.
        depth: How many of its modules are running.
        is_gathered: Whether the placeholders hold whole values.
    """

    name: str
    placeholders: list[Placeholder]
    inputs: torch.dtype | None = None
    outputs: torch.dtype | None = None
    depth: int = 0
    is_gathered: bool = False

    def gather(self) -> None:
        """Give the placeholders whole values. A collective."""
        with outside_modes():
            for each in self.placeholders:
                each.parameter.data = each.gathered()
        self.is_gathered = True

    def release(self) -> None:
        """Release the memory of the whole values."""
        with outside_modes():
            for each in self.placeholders:
                each.parameter.data = each.released
        self.is_gathered = False

    def put_in(self) -> None:
        """Put the placeholders into the modules."""
        for each in self.placeholders:
            for module, key in each.holders:
                module._parameters[key] = each.parameter

    def take_out(self) -> None:
        """Put the originals back into the modules."""
        for each in self.placeholders:
            for module, key in each.holders:
                module._parameters[key] = each.original


@dataclass(frozen=True)
class Call:
    """A module whose call needs a layer.

    Attributes:
        module: The module.
        layer: The layer.
        casts: Whether inputs and outputs of the call are cast to the dtypes of the layer.
    """

    module: nn.Module
    layer: Layer
    casts: bool


def divide(
    model: nn.Module, protected: Mapping[str, nn.Parameter]
) -> tuple[list[Layer], list[Call]]:
    """Divide a model into layers: as `fully_shard` did, else module by module.

    Args:
        model: The model.
        protected: The parameters to collect, by name.

    Returns:
        The layers, and the modules whose calls need them.
    """
    names = {module: name for name, module in model.named_modules()}
    holders: dict[int, Holders] = {}
    for module in names:
        for key, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((module, key))
    protected_names = {id(parameter): name for name, parameter in protected.items()}
    taken: set[int] = set()

    def placeholder(parameter: nn.Parameter, dtype: torch.dtype | None) -> Placeholder:
        taken.add(id(parameter))
        name = protected_names.get(id(parameter))
        return Placeholder.of_sharded(parameter, holders[id(parameter)], name, dtype)

    layers: list[Layer] = []
    calls: list[Call] = []
    for module, state in fsdp_states(model):
        if module is not state._modules[0]:
            continue
        policy = state._mp_policy
        sharded = [p.sharded_param for g in state._fsdp_param_groups for p in g.fsdp_params]
        layer = Layer(
            names[module],
            [placeholder(parameter, policy.param_dtype) for parameter in sharded],
            policy.param_dtype if policy.cast_forward_inputs else None,
            policy.output_dtype,
        )
        layers.append(layer)
        calls += [Call(each, layer, casts=True) for each in state._modules]
    for module, name in names.items():
        own = [p for p in module._parameters.values() if p is not None and is_sharded(p)]
        own = [parameter for parameter in own if id(parameter) not in taken]
        if own:
            layers.append(Layer(name, [placeholder(parameter, None) for parameter in own]))
    # Checkpointing runs a part of a layer again, without the module that it was gathered for.
    called = {(call.module, call.layer) for call in calls}
    for layer in layers:
        for module, _ in chain.from_iterable(each.holders for each in layer.placeholders):
            if (module, layer) not in called:
                called.add((module, layer))
                calls.append(Call(module, layer, casts=False))
    return layers, calls


@contextmanager
def outside_modes() -> Iterator[None]:
    """Leave `vmap`, all function modes, and autograd in this context."""
    with ExitStack() as stack:
        stack.enter_context(_vmap.outside())
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.no_grad())
        yield
