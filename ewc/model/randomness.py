"""Random numbers: those that collection draws, and those that it must not use up."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Randomness:
    """Keeps the global random state as it is while models run, and has a stream of its own.

    A loader goes on drawing from the global state between the runs. The stream continues from run
    to run, so that the samples of every batch get their own draws.

    Args:
        devices: Where the model runs.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._modules = [
            (torch.get_device_module(device.type), device)
            for device in sorted(set(devices), key=str)
            if device.type != "cpu"
        ]
        self._stream = self._state()

    def seed_from(self, generator: torch.Generator | None, rank: int) -> None:
        """Start the stream from one draw of `generator`, or of the global generator.

        Args:
            generator: The source of the seed; None for the global generator.
            rank: Added to it, so that processes that start from the same draw get other samples.
        """
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device)) + rank
        before = self._state()
        torch.default_generator.manual_seed(seed)
        for module, device in self._modules:
            with torch.device(device):
                module.manual_seed(seed)
        self._stream = self._state()
        self._set(before)

    @contextmanager
    def stream(self) -> Iterator[Callable[[], None]]:
        """Draw from the stream inside. It goes on from here only if what this yields is called."""
        before = self._state()
        self._set(self._stream)
        drawn = False

        def keep() -> None:
            nonlocal drawn
            drawn = True

        try:
            yield keep
            if drawn:
                self._stream = self._state()
        finally:
            self._set(before)

    @contextmanager
    def unchanged_on_failure(self, generator: torch.Generator | None) -> Iterator[None]:
        """Put the global state, and that of `generator`, back if an exception passes.

        Loaders may also draw from the global states of Python and NumPy.
        """
        before = self._state()
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

    def _state(self) -> list[Any]:
        others = [module.get_rng_state(device) for module, device in self._modules]
        return [torch.get_rng_state(), *others]

    def _set(self, states: list[Any]) -> None:
        torch.set_rng_state(states[0])
        for (module, device), state in zip(self._modules, states[1:], strict=True):
            module.set_rng_state(state, device)
