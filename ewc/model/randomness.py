"""The random stream of a collection, separate from the global random state."""

import _thread
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ewc.model.draws import Drawing, Draws
from ewc.model.seeding import seeds_for

States = list[Tensor]
"""Random states: the CPU's, then one for each accelerator."""

Others = tuple[Any, Any]
"""The random states of Python and of NumPy, the latter None if it is not imported."""


class Randomness:
    """The random stream that a model draws from while its gradients are collected.

    The global random state is the same after every run of the model as before, so that a loader,
    which draws from it between the runs, yields the same batches as without a collection. The
    stream continues from run to run, so that every batch has draws of its own.

    As long as there is one thread, the stream takes the place of the global state during a run.
    Other threads may draw from the global state at any time; beside them it is left alone, and a
    mode gives generators to the operations that draw. The mode is slow, so it is used for the first
    runs, and for the others only if one of these has drawn.

    Args:
        devices: The devices of the model. The stream starts from their present random states.
        generator: A generator that `restore` restores, too.
    """

    def __init__(
        self, devices: Iterable[torch.device], generator: torch.Generator | None = None
    ) -> None:
        self._accelerators = [
            (torch.get_device_module(device.type), device)
            for device in sorted(set(devices), key=str)
            if device.type not in ("cpu", "meta")
        ]
        self._stream = self._states()
        self._read = self._states
        self._before = (self._stream, others())
        self._generator = generator
        self._generator_before = None if generator is None else generator.get_state()
        self._draws: Draws | None = None
        self._draws_are_expected = True
        self._is_seeded = False
        self._others_draw = False
        self._may_make_generators = all(_has_generators(device) for _, device in self._accelerators)

    def seed_from(self, generator: torch.Generator | None, rank: int) -> None:
        """Seed the stream with one draw from `generator`.

        Args:
            generator: Where the seed is drawn from; None for the global generator.
            rank: Added to the seed, so that processes with equal generators draw different targets.
        """
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device)) + rank
        self._is_seeded = True
        if not self._is_alone:
            self._stream = [each.manual_seed(seed).get_state() for each in self._generators()]
            return
        with self._in_place(self._stream):
            torch.default_generator.manual_seed(seed)
            for module, device in self._accelerators:
                with torch.device(device):
                    module.manual_seed(seed)
            self._stream = self._states()

    @property
    def position(self) -> States:
        """Where the stream stands; assigned, the next run repeats the draws made from there."""
        return self._stream

    @position.setter
    def position(self, position: States) -> None:
        self._stream = position

    @contextmanager
    def stream(self) -> Iterator[Callable[[], None]]:
        """Draw from the stream inside the context, and from the global state again after it.

        Yields:
            A function `advance()`. If it was called, the next run continues the stream where this
            one ended; if not, the next run repeats the draws of this one.
        """
        advanced = False

        def advance() -> None:
            nonlocal advanced
            advanced = True

        with self._in_place(self._stream) if self._is_alone else self._beside() as states:
            self._read = states
            yield advance
            if advanced:
                self._stream = states()

    def within_stream(self) -> States:
        """Where the stream stands in the midst of a run."""
        return self._read()

    def expect_as_seen(self) -> None:
        """Expect draws from now on only if there were some, in runs that are like all others."""
        if self._draws is not None:
            self._draws_are_expected = self._is_seeded or self._draws.seen

    def restore(self) -> None:
        """Take back all draws since this was made.

        Those of Python and NumPy are included, because loaders draw from them too. Where other
        threads have drawn meanwhile, the global states cannot be restored.
        """
        if self._generator is not None and self._generator_before is not None:
            self._generator.set_state(self._generator_before)
        if self._others_draw:
            return
        states, (python, legacy) = self._before
        self._set(states)
        random.setstate(python)
        if legacy is not None:
            sys.modules["numpy"].random.set_state(legacy)

    @property
    def _is_alone(self) -> bool:
        """Whether the global states are set: no other thread draws, or there is no other way."""
        return _thread._count() == 0 or not self._may_make_generators

    @contextmanager
    def _in_place(self, stream: States) -> Iterator[Callable[[], States]]:
        """Put a stream in the place of the global states; yields a function that reads it."""
        before = self._states()
        try:
            self._set(stream)
            yield self._states
        finally:
            self._set(before)

    @contextmanager
    def _beside(self) -> Iterator[Callable[[], States]]:
        """Draw from the stream, where draws are expected; yields a function that reads it."""
        if self._draws is None:
            self._draws = Draws(self._generators(), self._in_place)
        draws = self._draws
        drawing = Drawing(draws) if self._draws_are_expected else nullcontext()
        draws.set_states(self._stream)
        before = self._states(), others()
        try:
            with seeds_for(draws.generators), drawing:
                yield draws.states
        finally:
            if not are_same(before, (self._states(), others())):
                self._others_draw = True

    def _generators(self) -> list[torch.Generator]:
        devices = [torch.device("cpu"), *(device for _, device in self._accelerators)]
        return [torch.Generator(device) for device in devices]

    def _states(self) -> States:
        """The global random states."""
        others = [module.get_rng_state(device) for module, device in self._accelerators]
        return [torch.default_generator.get_state(), *others]

    def _set(self, states: Sequence[Tensor]) -> None:
        torch.default_generator.set_state(states[0])
        for (module, device), state in zip(self._accelerators, states[1:], strict=True):
            module.set_rng_state(state, device)


def others() -> Others:
    """The global random states of Python and, if it is imported, of NumPy."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def are_same(one: tuple[States, Others], other: tuple[States, Others]) -> bool:
    """Whether all random states are the same."""
    (states, (python, legacy)), (other_states, (other_python, other_legacy)) = one, other
    if not all(map(torch.equal, states, other_states)) or python != other_python:
        return False
    if legacy is None or other_legacy is None:
        return legacy is other_legacy
    (_, keys, *rest), (_, other_keys, *other_rest) = legacy, other_legacy
    return bool((keys == other_keys).all()) and rest == other_rest


def _has_generators(device: torch.device) -> bool:
    """Whether generators can be made on a device; some backends have a global state alone."""
    try:
        torch.Generator(device)
    except (NotImplementedError, RuntimeError):
        return False
    return True
