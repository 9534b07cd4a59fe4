"""Runs something, and restores what it has changed, however it ends: Ctrl-C at any moment, too.

A `with` statement does not: Python may raise `KeyboardInterrupt` inside `__enter__`, after it has
switched something, and inside `__exit__`, before it has switched it back.
"""

from collections.abc import Callable, Sequence
from traceback import clear_frames
from types import TracebackType
from typing import TypeVar

Value = TypeVar("Value")
Restore = Callable[[], None]

_CLEANING_UP = {"contextlib", "ewc", "torch"}
"""The packages whose own errors, raised while they clean up after Ctrl-C, give way to it."""


def restoring(
    run: Callable[[], Value], *, always: Sequence[Restore] = (), on_failure: Sequence[Restore] = ()
) -> Value:
    """Run, then restore; the state to restore must be known before.

    Args:
        run: What to run.
        always: Restore what `run` changes only for its duration. Each may be called several times.
        on_failure: Restore the rest, after that, if an exception comes out of this function.

    Raises:
        KeyboardInterrupt: Also where PyTorch has met an error of its own while it cleaned up after
            one.
    """
    try:
        try:
            found = run()
            _call(always)
            return found
        except BaseException as error:
            _end(error)
            _call(always, on_failure)
            raise
    except BaseException as error:
        _end(error)  # all once more: the first time may have been interrupted
        _call(always, on_failure)
        interrupt = interruption(error)
        try:
            raise error if interrupt is None else interrupt
        finally:
            interrupt = None  # the traceback refers to this frame


def _end(error: BaseException | None) -> None:
    """End the contexts that an interrupt has left suspended: a generator may hold one.

    Later, when the traceback is dropped, they would undo what is restored now.
    """
    while error is not None:
        if not isinstance(error, Exception):
            clear_frames(error.__traceback__)
        error = error.__context__


def interruption(error: BaseException) -> BaseException | None:
    """The `KeyboardInterrupt` during which an error of PyTorch's or the library's own was raised.

    Returns:
        None if there is none, or if the user's code has raised the error in its place.
    """
    if not isinstance(error, Exception) or _origin(error.__traceback__) not in _CLEANING_UP:
        return None
    cause = error.__cause__ or error.__context__
    if cause is None or isinstance(cause, (KeyboardInterrupt, SystemExit)):
        return cause
    return interruption(cause)


def _origin(traceback: TracebackType | None) -> str:
    """The package whose code has raised an error."""
    package = ""
    while traceback is not None:
        package = str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        traceback = traceback.tb_next
    return package


def _call(*groups: Sequence[Restore]) -> None:
    """Call all, also where one of them is interrupted; then raise what was raised first."""
    failure: BaseException | None = None
    for restore in (each for group in groups for each in group):
        try:
            restore()
        except BaseException as error:
            failure = failure or error
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None  # the traceback refers to this frame
