"""All claims: `python docs/results/all.py`; `--quick` for a minute, `--write` for the pages."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

SCRIPTS = sorted(
    one.stem for one in Path(__file__).parent.glob("[!_]*.py") if one.stem != Path(__file__).stem
)


def main() -> None:
    """Every script in turn, with the options of this one."""
    for name in SCRIPTS:
        start = time.perf_counter()
        importlib.import_module(name).STUDY.main()
        print(f"{name}: {time.perf_counter() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
