"""Effective weights: what a model makes of parameters alone, before it meets the samples.

A model seldom uses a parameter just as it is. It takes parts of it, casts it, adds one to it,
normalises it, or computes it from other parameters. None of this involves the samples, so it runs
once, as usual, and autograd records it. What meets the samples in the end is an *effective
weight*: a tensor with a graph and without samples. A parameter itself is one, too.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from ewc import _vmap
from ewc.fisher.gradients import Gradient, summed
from ewc.fisher.paths.graph import leaves


class Weight:
    """One effective weight `q`, as it was when it met the samples.

    Args:
        tensor: The tensor.
        parameters: The protected parameters that it is made of, by name.

    Attributes:
        parameters: The same, without those that have fallen back to the loop since.
        is_parameter: Whether it is itself one of them.
        edge: Its edge in autograd's graph, which later writes into the tensor do not change; a
            parameter has none.
        layout: A tensor of its shape, strides and dtype, without memory of its own.
        device: Where it lies.
        uses: How many operations have used it.
        lacks_rule: Whether one of these had no rule, and took a copy per sample.
        received: The gradients of its uses that were received, and not squared yet.
    """

    def __init__(self, tensor: Tensor, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters
        self.is_parameter = any(tensor is each for each in parameters.values())
        self.layout: Tensor = tensor
        if not self.is_parameter:
            outer = tensor
            if isinstance(tensor.grad_fn, BackwardCFunction):
                # On PyTorch 2.6 an edge does not keep the node of a user's function alive.
                with torch.enable_grad():
                    outer = tensor.view_as(tensor)
            self.edge = get_gradient_edge(outer)
            self.layout = torch.empty_like(tensor, device="meta")
        self.device = tensor.device
        self.uses = 0
        self.lacks_rule = False
        self.received: list[Gradient] = []

    @property
    def name(self) -> str:
        """The name of the parameter that it is."""
        (name,) = self.parameters
        return name

    @property
    def is_complete(self) -> bool:
        """Whether the gradient of every use was received."""
        return len(self.received) == self.uses

    def take(self) -> Gradient:
        """The sum of the gradients that were received, which are then released."""
        gradients, self.received = self.received, []
        return summed(gradients)


class Weights:
    """The effective weights of one forward pass, found by the tensors that a model uses.

    Args:
        parameters: The protected parameters by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        # A key holds its node alive, so that no later node has the same identity.
        self._found: dict[Any, Weight | None] = {}

    def __getitem__(self, tensor: Tensor) -> Weight | None:
        """The weight of a tensor; None if no protected parameter is in its graph."""
        name = self._names.get(id(tensor))
        if name is None and tensor.grad_fn is None:
            return None
        key: Any = name or (tensor.grad_fn, tensor.output_nr)
        if key not in self._found:
            origins = [tensor] if name else leaves(tensor.grad_fn)
            parameters = {
                self._names[id(leaf)]: leaf for leaf in origins if id(leaf) in self._names
            }
            self._found[key] = Weight(tensor, parameters) if parameters else None
        return self._found[key]

    def used(self, *, without: Collection[str] = ()) -> list[Weight]:
        """The weights that operations have used, in the order in which they were first met.

        Args:
            without: Names of parameters that are no longer protected.
        """
        weights = [weight for weight in self._found.values() if weight is not None]
        for weight in weights:
            for name in without:
                weight.parameters.pop(name, None)
        return [weight for weight in weights if weight.uses and weight.parameters]


def is_weight(tensor: object) -> TypeGuard[Tensor]:
    """Whether a tensor has a graph and no samples."""
    return isinstance(tensor, Tensor) and tensor.requires_grad and not _vmap.is_wrapped(tensor)
