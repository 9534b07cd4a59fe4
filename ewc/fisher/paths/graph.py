"""Walks the graph that autograd has recorded."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


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
    for node in nodes(*roots):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
