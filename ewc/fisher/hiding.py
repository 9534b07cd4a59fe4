"""The compiler and a warning, hidden from the threads that collect, and from no others."""

import sys
import warnings
from typing import Any

from ewc._switches import Switch


class _Stance:
    """The stance of `torch.compile`: eager in threads inside `without_compilation`.

    Args:
        others: The stance of the other threads.
    """

    def __init__(self, others: Any) -> None:
        self.others = others

    def __getattr__(self, name: str) -> Any:
        eager = _compiler().DynamoStance("force_eager")
        return getattr(eager if without_compilation.holds else self.others, name)


def _compiler() -> Any:
    """The module that looks the stance up; None as long as the compiler is not imported."""
    return sys.modules.get("torch._dynamo.eval_frame")


def _hide_compiler() -> None:
    compiler = _compiler()
    if compiler is not None and not isinstance(compiler._stance, _Stance):
        compiler._stance = _Stance(compiler._stance)


def _show_compiler(_: None) -> None:
    compiler = _compiler()
    if compiler is not None and isinstance(compiler._stance, _Stance):
        compiler._stance = compiler._stance.others


without_compilation = Switch(lambda: None, _hide_compiler, _show_compiler)
"""What `torch.compile` has compiled runs eagerly.

Compiled code performs operations that no mode sees, and the compiler cannot trace what runs inside
`vmap`. As long as the compiler is not imported, nothing is compiled.
"""


class _Message:
    """The pattern of the warning, which matches in threads inside `without_vmap_warnings` alone."""

    def match(self, message: str) -> bool:
        """Called by `warnings`, as the method of a compiled pattern."""
        return message.startswith("There is a performance drop") and without_vmap_warnings.holds > 0


_FILTER: Any = ("ignore", _Message(), UserWarning, None, 0)


def _filters() -> list[Any]:
    filters: Any = warnings.filters  # which typeshed takes for read-only
    found: list[Any] = filters
    return found


def _add_filter() -> None:
    if _FILTER not in _filters():
        _filters().insert(0, _FILTER)


def _remove_filter(filters: list[Any]) -> None:
    for each in (filters, _filters()):
        while _FILTER in each:
            each.remove(_FILTER)


without_vmap_warnings = Switch(_filters, _add_filter, _remove_filter)
"""Where `vmap` runs an operation in a loop, it does not warn: the result is the same."""
