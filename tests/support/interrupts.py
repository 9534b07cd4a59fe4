"""Ctrl-C at a chosen moment: the k-th step of the interpreter, so that each can be tried in turn.

Python raises `KeyboardInterrupt` where a function begins, where a function written in C has
returned (whose result is then lost), and where a loop goes round. A trace function can raise there
too, and before any other line.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupt:
    """Runs a function, and raises `KeyboardInterrupt` at one of its steps.

    Args:
        run: The function.
        of_c: Whether the steps are the returns of functions written in C; otherwise they are lines,
            and the beginnings of functions.

    Attributes:
        place: Where it was raised last, as `file:line`; None if the function has ended before.
    """

    def __init__(self, run: Callable[[], object], *, of_c: bool = False) -> None:
        self.place: str | None = None
        self._run, self._of_c = run, of_c
        self._steps = 0

    def steps(self) -> int:
        """The number of steps of a run."""
        self.at(-1)
        return self._steps

    def at(self, step: int) -> bool:
        """Run up to a step, counted from 1.

        Returns:
            Whether the run was interrupted; not if Python ignores errors there, as in `__del__`.

        Raises:
            BaseException: Another error than `KeyboardInterrupt` came out of the run.
        """
        self._steps, self.place = 0, None

        def count(frame: FrameType) -> None:
            self._steps += 1
            if self._steps == step:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if event in ("call", "line"):
                count(frame)
            return trace

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            if event == "c_return" and argument not in (sys.settrace, sys.setprofile):
                count(frame)

        switch, function = (sys.setprofile, profile) if self._of_c else (sys.settrace, trace)
        before = sys.getprofile() if self._of_c else sys.gettrace()
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: setattr(self, "place", None)
        try:
            switch(function)  # type: ignore[arg-type]
            self._run()
        except KeyboardInterrupt:
            if self.place is None:
                raise
        finally:
            switch(before)
            sys.unraisablehook = hook
        return self.place is not None
