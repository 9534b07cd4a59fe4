"""Seeds that a model sets in its forward, kept from other threads."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ewc._switches import Switch

_NAME = "default_generator"  # what the functions of `torch.random` look up at each call
_own = threading.local()


class _DefaultGenerator:
    """Stands in `torch.random` for the default generator, as long as a thread collects.

    `torch.manual_seed`, `torch.set_rng_state` and the like act on it: on the generators of the
    thread inside `seeds_for`, and on the default generator in other threads.
    """

    def manual_seed(self, seed: int) -> torch.Generator:
        """Seed the generators of this thread."""
        found = [each.manual_seed(seed) for each in _current()]
        return found[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(_current()[0], name)


def _current() -> Sequence[torch.Generator]:
    return _own.generators if _switch.holds else [torch.default_generator]


def _change() -> None:
    setattr(torch.random, _NAME, _DefaultGenerator())


def _put_back(before: torch.Generator) -> None:
    setattr(torch.random, _NAME, before)


_switch = Switch(lambda: vars(torch.random)[_NAME], _change, _put_back)


@contextmanager
def seeds_for(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Let this thread's calls of `torch.manual_seed` and its like act on generators of its own.

    Args:
        generators: The CPU's, then one for each accelerator.
    """
    before = getattr(_own, "generators", ())
    _own.generators = generators
    try:
        with _switch:
            yield
    finally:
        _own.generators = before
