"""Switches of the whole process, which the threads that consolidate throw together."""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from typing_extensions import Self

Before = TypeVar("Before")

_lock = threading.RLock()


class Switch(Generic[Before]):
    """A context that changes a setting of the whole process for the threads inside it.

    The first thread that enters changes the setting, and the last one that leaves puts it back, so
    that consolidations which overlap leave it as it was. Meanwhile other threads see it changed.

    Where PyTorch looks a setting up at each use, `change` can hide it from the threads inside, and
    from no others: these have `holds`.

    Args:
        read: Reads the setting, without changing it.
        change: Changes it; it is called for every context that is entered.
        put_back: Puts it back; it is given what `read` has returned.
    """

    def __init__(
        self,
        read: Callable[[], Before],
        change: Callable[[], None],
        put_back: Callable[[Before], None],
    ) -> None:
        self._read, self._change, self._put_back = read, change, put_back
        self._before: list[Before] = []
        self._holds: dict[int, int] = {}
        _switches.append(self)

    @property
    def holds(self) -> int:
        """How many contexts of this thread are entered."""
        return self._holds.get(threading.get_ident(), 0)

    @property
    def is_changed(self) -> bool:
        """Whether a context of any thread is entered."""
        return bool(self._before)

    def keep(self, holds: int) -> None:
        """Leave all contexts of this thread but some; also what an interrupt has left entered."""
        while _lock._is_owned():  # type: ignore[attr-defined] # of an interrupted call
            _lock.release()
        with _lock:
            if holds > 0:
                self._holds[threading.get_ident()] = holds
            else:
                self._holds.pop(threading.get_ident(), None)
            if self._before and not self._holds:
                self._put_back(self._before[0])
                self._before.clear()

    def __enter__(self) -> Self:
        with _lock:
            if not self._before:
                self._before.append(self._read())
            self._holds[threading.get_ident()] = self.holds + 1
            self._change()
        return self

    def __exit__(self, *exception: object) -> None:
        self.keep(self.holds - 1)


_switches: list[Switch[Any]] = []


def all_holds() -> list[tuple[Switch[Any], int]]:
    """Every switch, and how many of its contexts this thread has entered."""
    return [(switch, switch.holds) for switch in _switches]
