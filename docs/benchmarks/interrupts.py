"""Ctrl-C at thousands of moments of a consolidation: what is left behind?

    python docs/benchmarks/interrupts.py

Every consolidation is interrupted at `--count` steps of the interpreter: lines and beginnings of
functions, of Python, PyTorch and the library, and returns of functions written in C. They are drawn
by chance from the places that it passes, each place at most once. After each interrupt the object,
the model and the process must be exactly as before, and `KeyboardInterrupt` must have come out. It
is run again and again in one process, with the same model and object, so that damage adds up.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.interrupts import CASES, Interrupted


def tried(interrupted: Interrupted, count: int) -> tuple[int, int, list[str]]:
    """Interrupt a consolidation at a number of places.

    Returns:
        The number of places, of interrupts, and what each that left something behind has left.
    """
    steps: dict[str, list[int]] = {}
    for step, place in enumerate(interrupted.places(), 1):
        steps.setdefault(place, []).append(step)
    chance = random.Random(0)
    chosen = chance.sample(sorted(steps), min(count, len(steps)))
    interrupts, faults = 0, []
    for place in chosen:
        try:
            interrupts += interrupted.at(chance.choice(steps[place])) is not None
        except AssertionError as error:
            faults.append(str(error))
    return len(steps), interrupts + len(faults), faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="interrupts of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    total, left = 0, []
    print("| consolidation | places | interrupts | something left |")
    print("|---|---|---|---|")
    for name, case in CASES.items():
        places = interrupts = 0
        faults = []
        for of_c in (False, True):
            found = tried(case.interrupted(of_c=of_c), arguments.count)
            places, interrupts = places + found[0], interrupts + found[1]
            faults += found[2]
        print(f"| {name} | {places:,} | {interrupts:,} | {len(faults)} |", flush=True)
        total += interrupts
        left += [f"{name}: {fault}" for fault in faults]
    if left:
        raise SystemExit("\n".join(left))
    print(f"\n{total:,} interrupts; nothing was left behind.")


if __name__ == "__main__":
    main()
