"""Which method each model of the zoo takes, after its Fisher was compared with the oracle's."""

from __future__ import annotations

import argparse
import os
import string
import sys
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path

from _harness import main as command
from _harness import table

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))  # the zoo is part of the tests

from tests.integrations.zoo import ZOO  # noqa: E402
from tests.integrations.zoo.entry import Entry, compare  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
METHODS = ("rule", "vmap", "loop", "unused")
LIBRARIES = ("torch", "transformers", "timm", "diffusers", "torch_geometric", "peft")
QUICK = 2
"""Models of each family in a quick run."""


def report(arguments: argparse.Namespace) -> str:
    """A table for each family, the reasons for slow methods, and what was run."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    notes: dict[str, str] = {}
    models = by_rule = 0
    parts = []
    for family, entries in ZOO.items():
        shown = dict(list(entries.items())[: QUICK if arguments.quick else None])
        rows = [row(name, entry, notes) for name, entry in shown.items()]
        models += len(rows)
        by_rule += sum(cells[2:4] == ["0", "0"] for cells in rows)
        parts.append(table([family, *METHODS], rows))
    parts.append("\n".join(f"- ({mark}) {reason}" for reason, mark in notes.items()))
    versions = [f"{name} {metadata.version(name)}" for name in LIBRARIES if util.find_spec(name)]
    parts.append(f"{models} models, {by_rule} of them wholly by rule. {', '.join(versions)}.")
    return "\n\n".join(filter(None, parts))


def row(name: str, entry: Entry, notes: dict[str, str]) -> list[str]:
    """The name, and how many parameters go by each method; a mark if there is a reason."""
    if entry.reason:
        mark = notes.setdefault(entry.reason, string.ascii_lowercase[len(notes)])
        name = f"{name} ({mark})"
    if util.find_spec(entry.library) is None:
        return [name, *["not installed"] * len(METHODS)]
    counts = compare(entry)
    return [name, *(str(counts[method]) for method in METHODS)]


def main(argv: Sequence[str] | None = None) -> None:
    command(
        "zoo",
        report,
        description="Which method each model of the zoo takes.",
        argv=argv,
        page=PAGE,
    )


if __name__ == "__main__":
    main()
