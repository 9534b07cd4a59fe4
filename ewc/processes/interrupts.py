"""Ctrl-C in distributed training: held back while processes exchange something.

A process that raised `KeyboardInterrupt` between a barrier and the end of the exchange behind it
would report its failure to processes that wait for its part of the exchange.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Stands before the process's own handler of SIGINT, and holds back what it raises.

    Only the main thread can set handlers, and only there does Python call them. In other threads
    this does nothing.

    Attributes:
        since: When the handler first raised something, as `time.monotonic` counts; None before.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self._is_held = True
        self._raised: BaseException | None = None
        self._handler: Any = None

    def install(self) -> None:
        """Take the handler's place. What it raises is held back until the first `release`."""
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(handler):
            self._handler = handler
            signal.signal(signal.SIGINT, self._receive)

    def remove(self) -> None:
        """Give the handler its place back, and raise what was held back."""
        self._is_held = True
        if self._handler is not None and signal.getsignal(signal.SIGINT) == self._receive:
            signal.signal(signal.SIGINT, self._handler)
        self._raise()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold back in this context what the handler raises; raise it at the end."""
        self.raise_held()
        self._is_held = True
        try:
            yield
        finally:
            self.raise_held()

    def hold(self) -> None:
        """Hold back what the handler raises, until `remove`."""
        self._is_held = True

    def raise_held(self) -> None:
        """Raise what was held back, and hold back nothing from here on."""
        self._is_held = False
        self._raise()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handler(number, frame)
        except BaseException as error:
            self.since = time.monotonic() if self.since is None else self.since
            if self._is_held:
                self._raised = error
                return
            # One is enough: what comes later must not disturb the report of this one.
            self._is_held = True
            raise

    def _raise(self) -> None:
        error, self._raised = self._raised, None
        if error is not None:
            self._is_held = True
            raise error
