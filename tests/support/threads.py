"""Other threads, beside which a test runs."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def another_thread() -> Iterator[None]:
    """One that does nothing, so that this one is not alone."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def at_once(*runs: Callable[[], Any]) -> list[Any]:
    """Run each in a thread of its own, switching between them as often as possible.

    Returns:
        What they have returned.

    Raises:
        BaseException: What one of them has raised.
    """
    found: list[Any] = [None] * len(runs)
    errors: list[BaseException] = []
    start = threading.Barrier(len(runs))

    def enter(index: int, run: Callable[[], Any]) -> None:
        try:
            start.wait()
            found[index] = run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=enter, args=each) for each in enumerate(runs)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for error in errors:
        raise error
    return found
