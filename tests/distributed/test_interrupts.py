"""Ctrl-C on one of several processes, or on all: all end soon, with nothing left behind."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ewc import EWC, Classification
from ewc.processes.ranks import PATIENCE, Ranks
from tests import oracle
from tests.distributed.models import build, data, full, shard, share
from tests.distributed.workers import Workers
from tests.support.asserts import assert_close, unchanged

SOON = 10 * PATIENCE
"""At rest it is a second; here, other programs may be running, and what takes long takes longer."""


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupted_later(seconds: float) -> None:
    threading.Timer(seconds, interrupt).start()


class Case:
    """A model, its data, and what one process would find."""

    def __init__(self, rank: int, world: int, sharded: bool) -> None:
        sizes = [5, 4, 3, 6][:world]
        self.model = build("perceptron")
        batch = data("perceptron", sum(sizes))
        self.expected = oracle.fisher(self.model, [batch])
        self.batches = share(batch, rank, sizes)
        if sharded:
            shard(self.model, "layers")
        self.ewc = EWC(self.model, Classification())
        self.handler = signal.getsignal(signal.SIGINT)

    def consolidated(self, batches: Any = None) -> str:
        """Consolidate; what was raised, if anything, and nothing else has happened then."""
        tasks = self.ewc.n_tasks
        try:
            with unchanged(self.ewc, self.model):
                try:
                    self.ewc.consolidate(self.batches if batches is None else batches)
                except KeyboardInterrupt:
                    assert self.ewc.n_tasks in (tasks, tasks + 1)
                    if self.ewc.n_tasks == tasks:
                        return "interrupted"
        except AssertionError:
            if self.ewc.n_tasks == tasks:
                raise
        assert self.ewc.n_tasks == tasks + 1
        return "committed"

    def check(self) -> None:
        """All is as before, and the next consolidation is right."""
        assert signal.getsignal(signal.SIGINT) is self.handler
        before = self.ewc.n_tasks
        assert self.consolidated() == "committed"
        found = {name: full(each) / (before + 1) for name, each in self.ewc.fisher.items()}
        assert_close(found, self.expected, 1e-10, relative=1e-5)


@contextmanager
def counting(act: Callable[[int, str], None]) -> Iterator[None]:
    """Call `act` before each meeting of the processes, and after it: its number, and where."""
    meet, number = Ranks._meet, -1

    def watched(ranks: Ranks, numbers: list[int]) -> list[int]:
        nonlocal number
        number += 1
        act(number, "before")
        found = meet(ranks, numbers)
        act(number, "after")
        return found

    with patch.object(Ranks, "_meet", watched):
        yield


def at_exchanges(rank: int, world: int, sharded: bool, guilty: list[int], step: int) -> int:
    case = Case(rank, world, sharded)
    seen: list[int] = []
    started = time.monotonic()
    with counting(lambda number, where: seen.append(number)):
        case.consolidated()
    soon = SOON + 5 * (time.monotonic() - started)
    last = max(seen)
    for target in [*range(0, last, step), last]:
        for moment in ("before", "after"):

            def act(number: int, where: str, at: Any = (target, moment)) -> None:
                if (number, where) == at and rank in guilty:
                    interrupt()

            started = time.monotonic()
            with counting(act):
                found = case.consolidated()
            assert time.monotonic() - started < soon
            if (target, moment) == (last, "after"):  # too late: all have agreed
                assert found == "committed"
            elif target < last:
                assert found == "interrupted", (target, moment, found)
            outcomes: list[Any] = [None] * world
            torch.distributed.all_gather_object(outcomes, found)
            assert len(set(outcomes)) == 1, (target, moment, outcomes)
    case.check()
    return last


@pytest.mark.parametrize("guilty", [[0], [0, 1]], ids=["one", "all"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_row_46e_at_exchanges(two: Workers, sharded: bool, guilty: list[int]) -> None:
    assert two.run(at_exchanges, sharded, guilty, 29 if sharded else 3)[0] > 5


@pytest.mark.slow
@pytest.mark.parametrize("guilty", [[0], [0, 1]], ids=["one", "all"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_row_46e_at_every_single_exchange(two: Workers, sharded: bool, guilty: list[int]) -> None:
    two.run(at_exchanges, sharded, guilty, 7 if sharded else 1)


@pytest.mark.slow
def test_row_46e_among_four(four: Workers) -> None:
    four.run(at_exchanges, True, [2], 1000)


@pytest.mark.slow
def test_row_46e_among_four_at_more_exchanges(four: Workers) -> None:
    four.run(at_exchanges, True, [2], 40)


def while_it_computes(rank: int, world: int, sharded: bool) -> None:
    """One process has much to do and is interrupted, or another one is."""
    for guilty in range(world):
        case = Case(rank, world, sharded)
        case.consolidated()

        def slow(case: Case = case, guilty: int = guilty) -> Iterator[Any]:
            for index in range(4000):
                if (rank, index) == (guilty, 5):
                    interrupted_later(0.05)
                time.sleep(0.01)
                yield case.batches[0]

        started = time.monotonic()
        assert case.consolidated(slow()) == "interrupted"
        assert time.monotonic() - started < SOON
        case.check()


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_row_46e_while_others_compute(two: Workers, sharded: bool) -> None:
    two.run(while_it_computes, sharded)


def while_it_waits(rank: int, world: int, sharded: bool, where: str) -> float:
    """The process that waits for another one leaves; the other one hears of it when it comes."""
    case = Case(rank, world, sharded)
    case.consolidated()
    late = 3 * PATIENCE

    def slow() -> Iterator[Any]:
        yield case.batches[0]
        if rank:
            time.sleep(late)
        else:
            interrupted_later(0.2)
        yield case.batches[0]

    started = time.monotonic()
    if where == "before it has begun":
        if rank:
            time.sleep(late)
        else:
            interrupted_later(0.2)
    assert case.consolidated(slow() if where == "in the loader" else None) == "interrupted"
    took = time.monotonic() - started
    case.check()
    return took


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("where", ["in the loader", "before it has begun"])
def test_row_46e_while_it_waits_for_another(two: Workers, sharded: bool, where: str) -> None:
    left, late = two.run(while_it_waits, sharded, where)
    assert left < late


_LONG = 2 * SOON


def left_alone(rank: int, world: int) -> float:
    """A process looks for reports, stalls, and arrives where another one has left meanwhile."""
    case = Case(rank, world, sharded=False)
    case.consolidated()
    stalled = 4

    def act(number: int, where: str) -> None:
        if (number, where) == (stalled, "before"):
            if rank == 0:
                time.sleep(4 * PATIENCE)  # behind its look
            else:
                interrupted_later(0.2)

    started = time.monotonic()
    with counting(act):
        assert case.consolidated() == "interrupted"
    took = time.monotonic() - started
    if rank:  # it was not at the barrier that the other one has left, and is there late
        time.sleep(_LONG)
        torch.distributed.all_reduce(torch.zeros(4, dtype=torch.int64))
    case.check()
    return took


@pytest.mark.slow
def test_row_46e_no_process_waits_for_one_that_has_left(two: Workers) -> None:
    assert max(two.run(left_alone)) < _LONG


def other_handlers(rank: int, world: int) -> None:
    """A handler that raises nothing does not stop anything; one that does is obeyed."""
    case = Case(rank, world, True)
    calls: list[int] = []
    case.handler = lambda number, frame: calls.append(number)
    before = signal.signal(signal.SIGINT, case.handler)
    try:
        with counting(lambda number, where: interrupt() if number == 3 else None):
            assert case.consolidated() == "committed"
        assert len(calls) == 2
        case.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_row_46e_other_handlers(two: Workers) -> None:
    two.run(other_handlers)


def in_another_thread(rank: int, world: int) -> None:
    """Only the main thread handles signals; a consolidation elsewhere works, and fails, as ever."""
    case = Case(rank, world, True)
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(case.consolidated())
            case.consolidated(iter([case.batches[0]] if rank else [case.batches[0], "nonsense"]))
        except BaseException as error:
            found.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found[0] == "committed"
    assert issubclass(found[1], RuntimeError if rank else Exception), found
    case.check()


def test_row_46e_in_another_thread(two: Workers) -> None:
    two.run(in_another_thread)


def a_loader_that_exits(rank: int, world: int) -> str:
    case = Case(rank, world, False)

    def leaves() -> Iterator[Any]:
        yield case.batches[0]
        if rank:
            raise SystemExit(3)
        yield from case.batches * 1000

    try:
        with unchanged(case.ewc, case.model):
            case.ewc.consolidate(leaves())
    except BaseException as error:
        case.check()
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_row_46e_a_process_that_exits(two: Workers) -> None:
    innocent, guilty = two.run(a_loader_that_exits)
    assert guilty == "SystemExit: 3"
    assert innocent.startswith("RuntimeError: ")
    assert "rank 1: SystemExit: 3" in innocent
