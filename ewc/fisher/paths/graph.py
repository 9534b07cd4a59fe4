"""Walks the graph that autograd has recorded, and describes it."""

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

_GENERATED = re.compile(r"Backward\d+$")
"""The names of PyTorch's own nodes, which expose all that they have saved.

The nodes of autograd.Functions, of scripted code and of writes into slices do not.
"""


def nodes(*roots: Any) -> Iterator[Any]:
    """All nodes of the graph behind `roots`, which are nodes themselves or None; each once."""
    waiting = list(roots)
    visited = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following not in visited:
                visited.add(following)
                waiting.append(following)


def leaves(*roots: Any) -> Iterator[Tensor]:
    """The leaves of that graph: the tensors in which `backward` would accumulate gradients."""
    yield from leaves_among(nodes(*roots))


def leaves_among(graph: Iterable[Any]) -> Iterator[Tensor]:
    """The leaves among the nodes of a graph."""
    for node in graph:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf


def correct_batch_norms(graph: Iterable[Any]) -> None:
    """Make the reverse passes of batch norm right, among the nodes of a graph.

    On the CPU, PyTorch's reverse pass of batch norm, which instance norm uses too, reads the input
    and the gradient as if one of them had the layout of the other, if one is contiguous and the
    strides of the other fit channels_last in an unusual way: a dimension of size one may have any
    stride, and `x.flatten(2).transpose(1, 2)` leaves such a gradient for a batch of one. With the
    usual strides, which describe the same memory, it recognises both layouts. Found in 2.13,
    for images of two and three dimensions, in eval and in train mode, for any number of samples.
    """
    for node in graph:
        if node.name() != "NativeBatchNormBackward0":
            continue
        node.register_prehook(lambda gradients: tuple(map(_with_usual_strides, gradients)))
        with suppress(RuntimeError):  # activation checkpointing has hooks of its own there
            node._raw_saved_input.register_hooks(_with_usual_strides, lambda kept: kept)


def _with_usual_strides(tensor: Tensor | None) -> Tensor | None:
    """The same memory; where only its strides are unusual for channels_last, with usual ones."""
    if tensor is None or not tensor.is_cpu or tensor.is_contiguous():
        return tensor
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims and tensor.is_contiguous(memory_format=layout):
            usual = torch.empty(tensor.shape, device="meta", memory_format=layout).stride()
            return tensor.detach().as_strided(tensor.shape, usual)
    return tensor


@dataclass(frozen=True)
class Description:
    """All that the derivatives along a graph depend on, except the values of its leaves.

    Attributes:
        operations: The operations, how they are connected, and their options.
        constants: Copies of the tensors that they have saved and that need no gradient.
    """

    operations: list[Hashable]
    constants: list[Tensor]

    def equals(self, other: "Description") -> bool:
        """Whether the derivatives are the same."""
        return self.operations == other.operations and all(
            map(torch.equal, self.constants, other.constants)
        )


def describe(edges: Sequence[GradientEdge]) -> Description | None:
    """Describe the graph behind some edges.

    Returns:
        None if a node does not expose what it has saved, or if to compare it would wait for a
        device.
    """
    found = list(nodes(*[edge.node for edge in edges]))
    numbers: dict[Any, int] = {node: number for number, node in enumerate(found)}
    numbers[None] = -1
    operations: list[Hashable] = [(numbers[edge.node], edge.output_nr) for edge in edges]
    constants: list[Tensor] = []
    for node in found:
        operations += [(numbers[following], output) for following, output in node.next_functions]
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            operations.append(id(leaf))
            continue
        if not _GENERATED.search(node.name()):
            return None
        operations.append(node.name())
        for saved in _saved(node):
            if not isinstance(saved, Tensor):
                operations.append(repr(saved))
            elif saved.requires_grad:
                continue  # made of leaves
            elif saved.is_cpu:
                constants.append(saved.clone())
            else:
                return None
    return Description(operations, constants)


def keeps_tensors(edges: Sequence[GradientEdge]) -> bool:
    """Whether a node of the graph behind some edges has saved tensors for the reverse pass."""
    graph = nodes(*[edge.node for edge in edges])
    return any(_names(node.__class__, "_raw_saved_") for node in graph)


def _saved(node: Any) -> Iterator[Any]:
    """What a node of autograd has saved: tensors, numbers, shapes."""
    for name in _names(node.__class__, "_saved_"):
        value = getattr(node, name)
        is_several = isinstance(value, (tuple, list)) and any(
            isinstance(each, Tensor) for each in value
        )
        yield from value if is_several else (value,)


@cache
def _names(kind: Any, prefix: str) -> list[str]:
    """The attributes of a kind of node that begin like this."""
    return [name for name in dir(kind) if name.startswith(prefix)]
