"""Ctrl-C at a chosen moment of a consolidation, so that each can be tried in turn.

Python raises `KeyboardInterrupt` where a function begins, where a function written in C has
returned (whose result is then lost), and where a loop goes round. A trace function can raise there
too, and before any other line.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from ewc import EWC, Classification, OnlineEWC
from tests.support.asserts import unchanged
from tests.support.tasks import CLASSES, INPUTS, make_task


class Interrupt:
    """Runs a function, and raises `KeyboardInterrupt` at one of its steps.

    Args:
        run: The function.
        of_c: Whether the steps are the returns of functions written in C; otherwise they are lines,
            and the beginnings of functions.

    Attributes:
        place: Where it was raised last, as `file:line`; None if the function has ended before, or
            if Python has ignored the error, as in `__del__`.
    """

    def __init__(self, run: Callable[[], object], *, of_c: bool = False) -> None:
        self.place: str | None = None
        self._run, self._of_c = run, of_c
        self._places: list[str] = []

    def places(self) -> list[str]:
        """The places of all steps of one run."""
        self.at(-1)
        return self._places

    def at(self, step: int) -> None:
        """Run up to a step, counted from 1.

        Raises:
            BaseException: Another error than `KeyboardInterrupt` came out of the run.
        """
        self._places, self.place = [], None

        def count(frame: FrameType) -> None:
            self._places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            if len(self._places) == step:
                self.place = self._places[-1]
                raise KeyboardInterrupt

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if event in ("call", "line"):
                count(frame)
            return trace

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            if event == "c_return" and argument is not sys.setprofile:
                count(frame)

        switch: Any = sys.setprofile if self._of_c else sys.settrace
        before = sys.getprofile() if self._of_c else sys.gettrace()
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: setattr(self, "place", None)
        try:
            switch(profile if self._of_c else trace)
            next(self._contained())
        except KeyboardInterrupt:
            pass
        finally:
            switch(before)
            sys.unraisablehook = hook

    def _contained(self) -> Iterator[object]:
        """Run in a generator, whose handled exceptions end with it.

        Where a trace function raises at the `return` of an `except` clause, Python 3.12 and later
        regard its exception as handled for ever. Ctrl-C does not come there.
        """
        yield self._run()


class Mixed(nn.Module):
    """Takes branches, and enters contexts of PyTorch in its forward.

    Args:
        noise: How much noise it adds.
    """

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(INPUTS, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.body(x).float()
        if self.noise:
            with torch.no_grad():
                noise = self.noise * torch.randn_like(y)
            y = y + noise
        y = checkpoint(torch.tanh, y, use_reentrant=False)
        return self.left(y) if x.sum() > 0 else self.right(y)


class Looped(nn.Module):
    """Reads values out of a tensor by a way that vmap cannot go."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, CLASSES)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.layer(x) * float(x.detach().numpy().size > 0)


class Copied(nn.Module):
    """Uses a weight in an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(INPUTS, CLASSES))
        self.norm = weight_norm(nn.Linear(CLASSES, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cdist(x, self.weight.T))


class Recurrent(nn.Module):
    """An LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.unsqueeze(2))[0][:, -1])


def compiled() -> nn.Module:
    """A network with compiled layers."""
    model = network()
    model[0].compile(backend="eager")
    model[3] = torch.compile(model[3], backend="eager")
    return model


def network() -> nn.Sequential:
    """A network with batch norm."""
    return nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))


@dataclass(frozen=True)
class Case:
    """A consolidation to interrupt.

    Attributes:
        make: Makes the model.
        kind: The class of the object.
        options: Its options.
    """

    make: Callable[[], nn.Module]
    kind: type[EWC] = EWC
    options: dict[str, Any] = field(default_factory=dict)

    def interrupted(self, *, of_c: bool) -> "Interrupted":
        """The consolidation of a new model by a new object."""
        return Interrupted(self, of_c=of_c)


class Interrupted:
    """A consolidation that is interrupted again and again, and must leave no trace of it.

    Args:
        case: What is consolidated.
        of_c: See `Interrupt`.
    """

    def __init__(self, case: Case, *, of_c: bool) -> None:
        torch.manual_seed(0)
        self._model = case.make()
        self._ewc = case.kind(self._model, Classification(), **case.options)
        self._task = make_task(batches=2)
        self._interrupt = Interrupt(self._consolidate, of_c=of_c)
        with _silent():
            self._consolidate()
        parameter = next(self._model.parameters())
        parameter.grad = torch.ones_like(parameter)
        parameter.register_hook(lambda gradient: gradient)
        next(self._model.children()).eval()

    def places(self) -> list[str]:
        """The places of all steps of a consolidation."""
        with _silent():
            return self._interrupt.places()

    def at(self, step: int) -> str | None:
        """Interrupt it at a step.

        Returns:
            Where it was interrupted; None if it was not.

        Raises:
            AssertionError: Something has changed, or another error than `KeyboardInterrupt` was
                raised; the message says where the consolidation was interrupted.
        """
        before = self._ewc.n_tasks
        try:
            with _silent(), unchanged(self._ewc, self._model):
                self._interrupt.at(step)
                if self._ewc.n_tasks > before and self._interrupt.place is None:
                    raise _NotInterruptedError
        except _NotInterruptedError:
            return None
        except Exception as error:
            raise AssertionError(f"at {self._interrupt.place}: {error!r}") from error
        return self._interrupt.place

    def _consolidate(self) -> None:
        self._ewc.consolidate(self._task)


@contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _NotInterruptedError(Exception):
    pass


CASES = {
    "rule": Case(network),
    "vmap": Case(Copied),
    "loop": Case(Looped),
    "branches": Case(Mixed),
    "draws": Case(lambda: Mixed(0.1)),
    "recurrent": Case(Recurrent),
    "compiled": Case(compiled),
    "exact": Case(network, options={"fisher_type": "exact"}),
    "mc, online": Case(network, OnlineEWC, {"fisher_type": "mc", "decay": 0.9}),
}
"""Consolidations that take every way through the library."""
