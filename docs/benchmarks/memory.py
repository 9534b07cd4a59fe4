"""Peak memory of collection, beside an ordinary forward and backward.

Every point is a process of its own, which builds the model and its data, runs once, and reports
by how much its peak resident memory lies above what it held before. So everything counts, also what
libraries allocate out of PyTorch's sight. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import _harness
import torch
from _harness import number, table
from _models import GPT, LSTM, Batch, LeNet, ResNet, gradients, mlp, tokens, vectors
from torch import nn

from ewc import Classification
from ewc.fisher import collect

MiB = 2**20


@dataclass(frozen=True)
class Sweep:
    """A model, and one size of its data that grows.

    Attributes:
        title: What the table calls it, with the size that grows.
        sizes: The sizes.
        quick: Fewer and smaller ones.
        make: `make(size)` gives the model and the batches.
    """

    title: str
    sizes: Sequence[int]
    quick: Sequence[int]
    make: Callable[[int], tuple[nn.Module, list[Batch]]]


SWEEPS = {
    "mlp": Sweep(
        "MLP 784-400-400-10: batch size",
        (512, 2048, 8192),
        (512, 1024),
        lambda n: (mlp(), [vectors(784)(n)]),
    ),
    "batches": Sweep(
        "MLP 784-400-400-10, batches of 128: how many",
        (4, 64, 256),
        (4,),
        lambda count: (mlp(), [vectors(784)(128) for _ in range(count)]),
    ),
    "cnn": Sweep(
        "LeNet-like CNN: batch size",
        (256, 1024, 2048),
        (256,),
        lambda n: (LeNet(), [vectors(1, 28, 28)(n)]),
    ),
    "pixels": Sweep(
        "ResNet with GroupNorm, 8 images: height and width",
        (64, 128, 192),
        (64,),
        lambda pixels: (ResNet(), [vectors(3, pixels, pixels)(8)]),
    ),
    "gpt": Sweep(
        "3-layer GPT, 64 positions: batch size",
        (16, 64, 128),
        (16,),
        lambda n: (GPT(), [tokens()(n)]),
    ),
    "positions": Sweep(
        "3-layer GPT, 8 sequences: positions",
        (128, 512, 1024),
        (128,),
        lambda s: (GPT(positions=s), [tokens(positions=s)(8)]),
    ),
    "steps": Sweep(
        "LSTM 32-128, 64 sequences: time steps",
        (64, 256, 512),
        (64,),
        lambda s: (LSTM(), [vectors(s, 32)(64)]),
    ),
}


def point(sweep: str, size: int, kind: str) -> int:
    """In this process: the peak above what was held before, in bytes."""
    torch.manual_seed(0)
    model, batches = SWEEPS[sweep].make(size)
    model.eval()
    small = SWEEPS[sweep].make(SWEEPS[sweep].quick[0])
    run = {"ordinary": _ordinary, "collection": _collection}[kind]
    run(small[0].eval(), [_first(small[1][0])])  # what a first call loads and keeps
    del small
    before = _kernel("VmRSS")
    run(model, batches)
    return max(0, _kernel("VmHWM") - before)


def _first(batch: Batch) -> Batch:
    return batch[0][:2], batch[1][:2]


def _ordinary(model: nn.Module, batches: list[Batch]) -> None:
    for batch in batches:
        gradients(model, batch)


def _collection(model: nn.Module, batches: list[Batch]) -> None:
    collect(
        model,
        dict(model.named_parameters()),
        batches,
        likelihood=Classification(),
        forward=None,
        fisher_type="empirical",
        max_samples=None,
        generator=None,
    )


def _kernel(field: str) -> int:
    """What Linux says of this process, in bytes.

    `getrusage` is no substitute: its peak begins with that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measure(sweep: str, size: int, kind: str) -> int:
    """The same in a process of its own, which imports what this one has imported."""
    done = subprocess.run(
        [sys.executable, __file__, "point", sweep, str(size), kind, str(torch.get_num_threads())],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            # Large blocks go back to the system when they are freed: the peak is what is held.
            "MALLOC_MMAP_THRESHOLD_": str(2**17),
            "MALLOC_ARENA_MAX": "1",
        },
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(done.stdout)


def report(arguments: argparse.Namespace) -> str:
    """One table, as Markdown."""
    rows = []
    for name, sweep in SWEEPS.items():
        if arguments.sweeps and name not in arguments.sweeps:
            continue
        for size in sweep.quick if arguments.quick else sweep.sizes:
            model, _ = sweep.make(size)
            accumulators = sum(4 * each.numel() for each in model.parameters())
            ordinary, collection = (
                measure(name, size, kind) for kind in ("ordinary", "collection")
            )
            rows.append(
                [f"{sweep.title} {size}"]
                + [
                    number(each / MiB)
                    for each in (
                        ordinary,
                        collection,
                        collection - ordinary,
                        accumulators,
                        collection - ordinary - accumulators,
                    )
                ]
            )
    head = ["peak, MiB", "forward + backward", "collection", "beyond", "accumulators", "work"]
    return "\n\n".join(
        [
            table(head, rows),
            f"{_harness.machine()}. Each number is the peak resident memory of a process of its "
            "own above what it held before, with model and data in place. *Beyond* is the "
            "difference of the two peaks; *work* is what is left of it without the accumulators "
            "(one float32 copy of the parameters).",
        ]
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sweeps", nargs="*", choices=list(SWEEPS), default=[])


def main(argv: Sequence[str] | None = None) -> None:
    """The command; or, where it begins with `point`, the process of one point."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["point"]:
        _, sweep, size, kind, threads = given
        torch.set_num_threads(int(threads))
        print(point(sweep, int(size), kind))
        return
    _harness.main(
        "memory", report, description=__doc__.splitlines()[0], options=_options, argv=argv
    )


if __name__ == "__main__":
    main()
