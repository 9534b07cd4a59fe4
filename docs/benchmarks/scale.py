"""What a consolidation costs where a model is sharded over processes: memory, messages, time.

Measured on two processes of this machine, over gloo; then carried over to large models by the
arithmetic that docs/scale.md shows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import _harness
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _harness import number, table
from _processes import together
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from ewc import EWC, Classification

PAGE = Path(__file__).parent.parent / "scale.md"
PROCESSES = 2
WIDTH = 1024
CLASSES = 16
MiB = 2**20

# Large blocks go back to the system when they are freed: the peak of a process is what it holds.
os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_ARENA_MAX": "1"}


def build(depth: int) -> nn.Sequential:
    """`depth` layers of about a million parameters each."""
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def sharded(depth: int) -> nn.Sequential:
    """The same, every layer sharded by itself."""
    model = build(depth)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model


def data(samples: int) -> tuple[Tensor, Tensor]:
    """Random inputs and classes."""
    return torch.randn(samples, WIDTH), torch.randint(CLASSES, (samples,))


def _memory(depth: int) -> tuple[float, ...]:
    """In MiB: a layer, and this process's share of the model, what it keeps, and the peak."""
    model = sharded(depth)
    batch = data(8)
    small = sharded(1)
    EWC(small, Classification()).consolidate([batch])  # what a first call loads and keeps
    share = sum(p.to_local().nbytes for p in model.parameters())
    ewc = EWC(model, Classification())
    before = _kernel("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    ewc.consolidate([batch])
    peak = _kernel("VmHWM") - before
    kept = sum(t.to_local().nbytes for t in (*ewc.fisher.values(), *ewc.anchor.values()))
    return 4 * WIDTH * (WIDTH + 1) / MiB, share / MiB, kept / MiB, peak / MiB


def _kernel(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _time(depth: int, samples: int, rounds: int) -> tuple[float, float]:
    """Seconds of a training pass without optimizer, and the ratio of a consolidation to it."""
    model = sharded(depth)
    batches = [data(samples) for _ in range(4)]
    ewc = EWC(model, Classification())

    def train() -> None:
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
        model.zero_grad()

    seconds: dict[str, list[float]] = {"train": [], "consolidate": []}
    for _ in range(rounds + 1):
        for name, run in (("train", train), ("consolidate", lambda: ewc.consolidate(batches))):
            dist.barrier()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    train_, consolidate = seconds["train"][1:], seconds["consolidate"][1:]
    ratios = [b / a for a, b in zip(train_, consolidate, strict=True)]
    return statistics.median(train_), statistics.median(ratios)


def _narrowed() -> list[list[str]]:
    """What the penalty would be with anchor or Fisher in bfloat16, after steps of some size."""
    torch.manual_seed(0)
    anchor = torch.randn(10**6) * 0.02
    fisher = torch.rand(10**6) ** 8
    rows = []
    for step in (1e-2, 1e-3, 1e-4):
        theta = anchor + step * anchor.abs().mean() * torch.randn(10**6)

        def penalty(f: Tensor, a: Tensor, theta: Tensor = theta) -> float:
            return (f.double() * (theta.double() - a.double()) ** 2).sum().item()

        exact = penalty(fisher, anchor)
        errors = [
            abs(penalty(f, a) / exact - 1)
            for f, a in ((fisher.bfloat16(), anchor), (fisher, anchor.bfloat16()))
        ]
        rows.append([f"{step:g}", *(f"{100 * error:,.2g} %" for error in errors)])
    return rows


def estimates(ratio: float) -> list[list[str]]:
    """Large models in bfloat16 on accelerators, from the measured ratio and three assumptions."""
    tokens, flops, bandwidth = 10**6, 4e14, 5e10
    rows = []
    for billions, devices, layers in ((1, 1, 24), (7, 8, 32), (70, 64, 80)):
        parameters = billions * 10**9
        state = 8 * parameters / devices
        work = 4 * parameters / devices + 6 * parameters / layers
        compute = ratio * 6 * parameters * tokens / (flops * devices)
        sent = 8 * parameters * (devices - 1) / devices
        runs = tokens / devices / 16_384
        rows.append(
            [
                f"{billions} billion on {devices}",
                number(state / 1e9),
                number(work / 1e9),
                number(sent / 1e9),
                number(compute),
                number(runs * sent / bandwidth),
            ]
        )
    return rows


def report(arguments: argparse.Namespace) -> str:
    """The tables, as Markdown."""
    depths = (2, 4) if arguments.quick else (4, 8, 16)
    memory = []
    for depth in depths:
        layer, share, kept, peak = together(PROCESSES, _memory, depth)
        work = peak - 1.5 * kept
        memory.append([f"{depth} layers", *map(number, (layer, share, kept, peak, work))])
    samples = 32 if arguments.quick else 256
    seconds, ratio = together(PROCESSES, _time, 4, samples, arguments.rounds)
    return "\n\n".join(
        [
            table(
                ["MiB, on each of 2 processes", "a layer", "parameters", "kept", "peak", "work"],
                memory,
            ),
            f"A pass of forward and backward over {4 * samples} samples on each process took "
            f"{number(seconds)} s, with {WIDTH} x {WIDTH} layers, 4 of them; a consolidation over "
            f"the same took {number(ratio)} times as long.",
            table(
                ["step, relative to a weight", "Fisher in bfloat16", "anchor in bfloat16"],
                _narrowed(),
            ),
            table(
                [
                    "parameters, devices",
                    "state, GB each",
                    "work, GB each",
                    "sent in a run, GB each",
                    "computing, s",
                    "sending, s",
                ],
                estimates(ratio),
            ),
            f"{_harness.machine()}; 2 processes of 1 thread.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    _harness.main(
        "scale", report, description=__doc__.splitlines()[0], rounds=5, argv=argv, page=PAGE
    )


if __name__ == "__main__":
    main()
