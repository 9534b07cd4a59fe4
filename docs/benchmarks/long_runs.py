"""Memory of long runs: a thousand consolidations, and a hundred thousand penalties.

    python docs/benchmarks/long_runs.py

Resident memory of the process is read before and after, once everything has been run a few times,
and must not have grown by more than `--limit` MiB: that is more than allocators move back and
forth, and less than one copy of the state would be for every thousandth call.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc import EWC, Classification, OnlineEWC

MiB = 2**20


def resident() -> float:
    """The resident memory of this process now, in MiB; the peak where there is no /proc."""
    gc.collect()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(what: str, run: Callable[[], None], times: int, limit: float) -> None:
    """Run a few times, then `times` more; print what memory was before and after.

    Raises:
        SystemExit: If it has grown by more than `limit` MiB.
    """
    for _ in range(min(times, 100)):
        run()
    before, begin = resident(), time.perf_counter()
    for _ in range(times):
        run()
    seconds, after = time.perf_counter() - begin, resident()
    print(f"| {what} | {times:,} | {before:.1f} | {after:.1f} | {1e3 * seconds / times:.2g} |")
    if after - before > limit:
        raise SystemExit(f"{what}: memory has grown by {after - before:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--consolidations", type=int, default=1_000)
    parser.add_argument("--penalties", type=int, default=100_000)
    parser.add_argument("--limit", type=float, default=4.0, help="MiB that memory may grow by")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    data: list[tuple[Tensor, Tensor]] = [(torch.rand(32, 64), torch.randint(10, (32,)))]
    (x, y), *_ = data

    print("| run | times | MiB before | MiB after | ms each |")
    print("|---|---|---|---|---|")
    for kind in (EWC, OnlineEWC):
        ewc = kind(model, Classification(), strength=1e-3)

        def consolidate(ewc: EWC = ewc) -> None:
            ewc.consolidate(data)

        def step(ewc: EWC = ewc) -> None:
            optimizer.zero_grad()
            ewc().backward()
            optimizer.step()

        def train(ewc: EWC = ewc) -> None:
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + ewc()).backward()
            optimizer.step()

        name = kind.__name__
        limit = arguments.limit
        measured(f"`{name}.consolidate`", consolidate, arguments.consolidations, limit)
        measured(f"`{name}()`, backward, step", step, arguments.penalties, limit)
        measured(f"training step with `{name}()`", train, arguments.penalties // 10, limit)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nPeak: {peak:.1f} MiB.")


if __name__ == "__main__":
    main()
