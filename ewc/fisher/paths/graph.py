"""Walks the graph that autograd has recorded."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def nodes(tensor: Tensor) -> Iterator[Any]:
    """All nodes of the graph that `tensor` came from."""
    todo = [tensor.grad_fn]
    visited = set(todo)
    while todo:
        node = todo.pop()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following not in visited:
                visited.add(following)
                todo.append(following)


def leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """The beginnings of that graph: the tensors that gradients would accumulate in."""
    for node in nodes(tensor):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
