"""The random stream of a collection, separate from the global random state."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Randomness:
    """The random stream that a model draws from while its gradients are collected.

    The global random state is put back after every run of the model, so that a loader, which draws
    from it between the runs, yields the same batches as without a collection. The stream continues
    from run to run, so that every batch has draws of its own.

    Args:
        devices: The devices of the model. The stream starts from their present random states.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._accelerators = [
            (torch.get_device_module(device.type), device)
            for device in sorted(set(devices), key=str)
            if device.type != "cpu"
        ]
        self._stream = self._states()

    def seed_from(self, generator: torch.Generator | None, rank: int) -> None:
        """Seed the stream with one draw from `generator`.

        Args:
            generator: Where the seed is drawn from; None for the global generator.
            rank: Added to the seed, so that processes with equal generators draw different targets.
        """
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device)) + rank
        before = self._states()
        torch.default_generator.manual_seed(seed)
        for module, device in self._accelerators:
            with torch.device(device):
                module.manual_seed(seed)
        self._stream = self._states()
        self._set(before)

    @property
    def position(self) -> list[Any]:
        """Where the stream stands; assigned, the next run repeats the draws made from there."""
        return self._stream

    @position.setter
    def position(self, position: list[Any]) -> None:
        self._stream = position

    @contextmanager
    def stream(self) -> Iterator[Callable[[], None]]:
        """Draw from the stream inside the context, and from the global state again after it.

        Yields:
            A function `advance()`. If it was called, the next run continues the stream where this
            one ended; if not, the next run repeats the draws of this one.
        """
        before = self._states()
        self._set(self._stream)
        advanced = False

        def advance() -> None:
            nonlocal advanced
            advanced = True

        try:
            yield advance
            if advanced:
                self._stream = self._states()
        finally:
            self._set(before)

    @contextmanager
    def unchanged_on_failure(self, generator: torch.Generator | None) -> Iterator[None]:
        """If the context raises, restore the global random states, and that of `generator`.

        Those of Python and NumPy are included, because loaders draw from them too.
        """
        before = self._states()
        python = random.getstate()
        numpy = sys.modules.get("numpy")
        legacy = None if numpy is None else numpy.random.get_state()
        state = None if generator is None else generator.get_state()
        try:
            yield
        except BaseException:
            self._set(before)
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(legacy)
            if generator is not None and state is not None:
                generator.set_state(state)
            raise

    def _states(self) -> list[Any]:
        """The global random states: the CPU's, then one for each accelerator."""
        others = [module.get_rng_state(device) for module, device in self._accelerators]
        return [torch.get_rng_state(), *others]

    def _set(self, states: list[Any]) -> None:
        torch.set_rng_state(states[0])
        for (module, device), state in zip(self._accelerators, states[1:], strict=True):
            module.set_rng_state(state, device)
