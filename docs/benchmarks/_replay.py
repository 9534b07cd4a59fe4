"""Runs the operations of PyTorch that a function has run once more, as straight code.

Nothing else is run: neither Python code of the library or of the model, nor function modes, `vmap`
and autograd. So the time is a lower bound for any code that runs the same operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Operations(TorchDispatchMode):
    """Writes down the operations inside the context as lines of Python.

    Attributes:
        lines: One for each operation, with the variables in it and those that it makes.
        values: What the lines refer to, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, set[str], set[str]]] = []
        self.values: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        self._kept: list[Any] = []  # so that no other tensor gets the identity of one

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = [self._written(each) for each in args]
        given += [f"{name}={self._written(each)}" for name, each in kwargs.items()]
        used = self.names((args, kwargs))
        outputs = found if isinstance(found, (tuple, list)) else [found]
        names = [self._new(each) for each in outputs]
        targets = ", ".join(names) + "," * isinstance(found, (tuple, list))
        call = f"{self._value(func)}({', '.join(given)})"
        self.lines.append((f"{targets} = {call}" if names else call, used, set(names) - {"_"}))
        return found

    def names(self, tree: Any) -> set[str]:
        """The names of the tensors in some lists or tuples."""
        return {self._names[id(x)] for x in tree_leaves(tree) if id(x) in self._names}

    def _new(self, output: Any) -> str:
        """The name for an output; `_` if it is no tensor, or an argument that was written to."""
        is_new = isinstance(output, Tensor) and id(output) not in self._names
        return self._name(output) if is_new else "_"

    def _name(self, tensor: Tensor) -> str:
        self._kept.append(tensor)
        return self._names.setdefault(id(tensor), f"t{len(self._names)}")

    def _value(self, value: Any) -> str:
        name = f"v{len(self.values)}"
        self.values[name] = value
        return name

    def _written(self, value: Any) -> str:
        if isinstance(value, Tensor):
            if id(value) not in self._names:
                self.values[self._name(value)] = value  # made outside of the operations
            return self._names[id(value)]
        if isinstance(value, list):
            return f"[{', '.join(map(self._written, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(f'{self._written(each)}, ' for each in value)})"
        return self._value(value)


def replay(run: Callable[[], object]) -> Callable[[], None]:
    """A function that runs the same operations on the same tensors.

    A tensor is freed after its last use, one that `run` returns at the end.
    """
    with _Operations() as seen:
        returned = seen.names(run())
    last = {name: at for at, (_, used, made) in enumerate(seen.lines) for name in used | made}
    source = ["def again():"]
    for at, (line, used, made) in enumerate(seen.lines):
        dead = {name for name in used | made if last[name] == at}
        done = sorted(dead - seen.values.keys() - returned)
        source.append(f"    {line}" + (f"; del {', '.join(done)}" if done else ""))
    space = dict(seen.values)
    exec("\n".join(source), space)

    def again() -> None:
        # Gradients are on: without them, an LSTM does not keep what its reverse pass takes.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            space["again"]()

    return again
