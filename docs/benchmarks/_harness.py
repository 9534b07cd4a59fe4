"""What the benchmarks share: interleaved timing, Markdown tables, and the page that shows them.

Two runs on a shared machine differ by more than two methods do. So all contenders take turns,
round after round, and what is reported is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

Name = TypeVar("Name", bound=Hashable)
PAGE = Path(__file__).parent.parent / "benchmarks.md"
SHORTEST = 0.05
"""Seconds that a contender is repeated for in each round, so that a clock can time it."""
LONGEST = 12.0
"""Seconds after which a slow contender sits out the rounds that are left."""
ALONE = "autograd alone: hand over ready gradients"


class Timings(Generic[Name]):
    """Seconds that each contender took for one run, round by round.

    Args:
        seconds: By contender's name, one entry for each round.
    """

    def __init__(self, seconds: Mapping[Name, Sequence[float]]) -> None:
        self.seconds = seconds

    def median(self, name: Name) -> float:
        """Seconds for one run."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: Name, unit: Name) -> float:
        """How many times as long as `unit`: the median of the rounds' ratios."""
        return statistics.median(self._ratios(name, unit))

    def spread(self, unit: Name) -> float:
        """The middle half of the rounds' ratios, as a share of the median: the widest of all."""
        widths = [0.0]
        for name in self.seconds:
            ratios = self._ratios(name, unit)
            if name != unit and len(ratios) > 1:
                low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
                widths.append((high - low) / statistics.median(ratios))
        return max(widths)

    def _ratios(self, name: Name, unit: Name) -> list[float]:
        # A slow contender has fewer rounds, the first ones.
        return [a / b for a, b in zip(self.seconds[name], self.seconds[unit], strict=False)]


def interleave(
    contenders: Mapping[Name, Callable[[], object]],
    rounds: int,
    *,
    runs: Mapping[Name, int] | None = None,
    clock: Callable[[Callable[[], object], int], float] | None = None,
    seconds: float = math.inf,
) -> Timings[Name]:
    """Time all contenders in turn, `rounds` times, after one run each that is not counted.

    Args:
        contenders: What to time, by name. Give the unit of the ratios first: it must not be slow.
        rounds: How many rounds.
        runs: For contenders whose call is not one run but several: how many.
        clock: `clock(run, repeats)` gives the seconds of several runs; None for the host's clock.
        seconds: The time after which no round begins; the first round always does.
    """
    start = time.perf_counter()
    timed = _timed if clock is None else clock
    per_call = {name: 1 if runs is None else runs.get(name, 1) for name in contenders}
    repeats = {}
    for name, run in contenders.items():
        took = timed(run, 1)
        if took < SHORTEST:  # the first run is no measure of the others
            took = timed(run, 1)
        repeats[name] = max(1, math.ceil(SHORTEST / took))
    found: dict[Name, list[float]] = {name: [] for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    gc.collect()
    gc.freeze()  # a collection then looks only at what the contenders leave behind
    try:
        for index in range(rounds):
            if index and time.perf_counter() - start > seconds:
                break
            for name, run in contenders.items():
                if spent[name] > LONGEST:
                    continue
                gc.collect()
                took = timed(run, repeats[name])
                spent[name] += took
                found[name].append(took / (repeats[name] * per_call[name]))
    finally:
        gc.unfreeze()
    return Timings(found)


def _timed(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start


class _Ready(Function):
    """No arithmetic: what a function of many parameters costs autograd."""

    @staticmethod
    def forward(ctx: Any, ready: list[Tensor], *_: Tensor) -> Tensor:
        ctx.ready = ready
        return ready[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.ready)


def autograd_alone(parameters: Sequence[Tensor]) -> Tensor:
    """A function of parameters whose gradients are there already: the parameters themselves."""
    value: Tensor = _Ready.apply([each.detach() for each in parameters], *parameters)
    return value


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Three digits where they mean something: 0.012, 0.12, 1.23, 12.3, 1,234."""
    size = abs(value)
    digits = 3 if size < 0.1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:,.{digits}f}"


def short(reason: Exception) -> str:
    """The first line of a message, if it is not a long one."""
    line = next(iter(str(reason).strip().splitlines()), "") or type(reason).__name__
    line = line.replace("|", "/").replace("<", "").replace(">", "")
    return line if len(line) <= 140 else line[:137] + "..."


def machine(*libraries: str) -> str:
    """Where the numbers come from, in one sentence.

    Args:
        libraries: Distributions whose versions matter; those that are absent are left out.
    """
    versions = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    for name in libraries:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    vectors = torch.backends.cpu.get_cpu_capability()
    return (
        f"{_processor()} ({vectors}), {cores} cores, {torch.get_num_threads()} threads; "
        + ", ".join(versions)
    )


def keep_freed_memory() -> bool:
    """Let the allocator of glibc keep all memory that is freed; whether it is that allocator.

    Else it may return memory to the kernel, which clears every page before it hands it out again.
    When that happens depends on what else lies in memory, and it may take longer than what is
    measured.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(set_option(mmap_threshold, 2**25) and set_option(trim_threshold, 2**30))


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return names[0].strip() if names else platform.machine()


def write(script: str, text: str, page: Path = PAGE) -> None:
    """Put a script's tables between its markers on the page.

    Raises:
        ValueError: The page does not have the pair of markers exactly once.
    """
    begin, end = markers(script)
    content = page.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{page.name} must have {begin!r} and {end!r} once each.")
    before, rest = content.split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def markers(script: str) -> tuple[str, str]:
    """The lines of the page that a script's tables stand between."""
    return f"<!-- {script}: begin -->", f"<!-- {script}: end -->"


def main(
    script: str,
    report: Callable[[argparse.Namespace], str],
    *,
    description: str,
    rounds: int = 9,
    options: Callable[[argparse.ArgumentParser], object] | None = None,
    argv: Sequence[str] | None = None,
    page: Path = PAGE,
) -> None:
    """The command line of a benchmark.

    Args:
        script: Its name, without `.py`.
        report: From the arguments to Markdown.
        description: What it measures.
        rounds: The default of `--rounds`.
        options: Adds options of its own.
        argv: The arguments; None for those of the process.
        page: Where `--write` writes.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=None, help=f"default: {rounds}, or 3")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and 3 rounds")
    parser.add_argument("--write", action="store_true", help=f"also write into {page.name}")
    if options is not None:
        options(parser)
    arguments = parser.parse_args(argv)
    if arguments.rounds is None:
        arguments.rounds = 3 if arguments.quick else rounds
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers', at every call
        text = report(arguments)
    given = [each for each in (sys.argv[1:] if argv is None else argv) if each != "--write"]
    text = f"`{' '.join(['python', f'docs/benchmarks/{script}.py', *given])}`\n\n{text}"
    print(text)
    if arguments.write:
        write(script, text, page)
