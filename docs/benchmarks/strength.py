"""How strong by default? `strength = k / scale of the curvature`, for several rules and many k.

    python docs/benchmarks/strength.py           # measure what strength.json lacks; 45 minutes
    python docs/benchmarks/strength.py --table   # print the tables from it
    python docs/benchmarks/strength.py --quick   # one seed, few settings, a minute; writes nothing

Every setting of `_strength_settings.py` is learned for every rule, constant k and seed. The first
task is learned once per seed; each run goes on from a copy. `proximal` is the alternative to the
penalty's gradient: after each step of the optimizer, the penalty's own proximal step.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from _harness import machine, write
from _strength_settings import SETTINGS, Setting, Task
from _strength_tables import report
from torch import Tensor, nn

from ewc import EWC

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parent.parent / "strength.md"
SEEDS = 3
BATCH = 32
FAR = 1e3
"""No parameter comes near this; one that does is on its way to infinity."""
EVERY = 20  # steps from one look for divergence to the next


def largest(curvature: Sequence[Tensor]) -> float:
    """The largest entry."""
    return max(float(one.max()) for one in curvature)


def top(curvature: Sequence[Tensor]) -> float:
    """The mean of the largest entries: one of a thousand, but at least ten."""
    flat = torch.cat([one.flatten() for one in curvature])
    return float(flat.topk(min(len(flat), max(10, len(flat) // 1000))).values.mean())


def weighted(curvature: Sequence[Tensor]) -> float:
    """The mean in which each entry counts by its size: sum A^2 / sum A."""
    flat = torch.cat([one.flatten() for one in curvature])
    return float(flat.square().sum() / flat.sum())


def mean(curvature: Sequence[Tensor]) -> float:
    """The mean of all entries."""
    return float(torch.cat([one.flatten() for one in curvature]).mean())


def layers(curvature: Sequence[Tensor]) -> float:
    """The median over parameters of their largest entry."""
    return float(torch.tensor([float(one.max()) for one in curvature]).median())


RULES: dict[str, Callable[[Sequence[Tensor]], float]] = {
    one.__name__: one for one in (largest, top, weighted, mean, layers)
}
GRIDS: dict[str, tuple[float, ...]] = {
    "largest": (0, 0.1, 0.3, 1, 2, 3, 5, 10, 30, 100, 300, 1000, 1e4, 1e5),
    "weighted": (0.3, 1, 3, 10),
    "mean": (0.03, 0.1, 0.3, 1),
}
TIMES = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""The proximal step is taken with these multiples of the best k of `k / largest`."""


def curvature_of(ewc: EWC, setting: Setting) -> dict[str, Tensor]:
    """The curvature of the penalty before `strength`, by name."""
    decay = 1.0 if setting.decay is None else setting.decay
    return {name: decay * one for name, one in ewc.fisher.items()}


def train(
    model: nn.Module, ewc: EWC, task: Task, setting: Setting, seed: int, *, proximal: bool
) -> bool:
    """Learn a task; whether training stayed finite."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = setting.optimizer_of(model)
    pulls = _pulls(model, ewc, setting) if proximal else ()
    for step in range(1, setting.steps + 1):
        chosen = torch.randint(len(task.x), (BATCH,), generator=generator)
        loss = task.loss(model, task.x[chosen], task.y[chosen])
        if not proximal:
            loss = loss + ewc()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for parameter, pull, anchor in pulls:
                parameter.add_(pull * anchor).div_(1 + pull)
        if step % EVERY == 0 and not _finite(model):
            return False
    return _finite(model)


def _pulls(
    model: nn.Module, ewc: EWC, setting: Setting
) -> Iterable[tuple[nn.Parameter, Tensor, Tensor]]:
    parameters, anchor = dict(model.named_parameters()), ewc.anchor
    factor = setting.lr * ewc.strength
    curvature = curvature_of(ewc, setting)
    return [(parameters[name], factor * one, anchor[name]) for name, one in curvature.items()]


@torch.no_grad()
def _finite(model: nn.Module) -> bool:
    largest = max(float(one.abs().max()) for one in model.parameters())
    return largest < FAR  # False for NaN


def consolidate(ewc: EWC, task: Task) -> None:
    """Protect a task."""
    batches = zip(task.x.split(256), task.y.split(256), strict=True)
    ewc.consolidate(batches, likelihood=task.likelihood, forward=task.forward)


class Sequel:
    """A setting after its first task, from which every run goes on."""

    def __init__(self, setting: Setting, seed: int) -> None:
        torch.manual_seed(seed)
        self.setting, self.seed = setting, seed
        self.tasks = setting.data(setting.tasks, seed)
        self.model = setting.model()
        self.ewc = setting.ewc_of(self.model, self.tasks[0])
        self._train(self.model, self.ewc, 0, proximal=False)
        consolidate(self.ewc, self.tasks[0])

    def run(self, rule: str, k: float, *, proximal: bool = False) -> dict[str, Any]:
        """Learn the other tasks.

        Returns:
            `average`: the mean score of all tasks at the end; `last`: that of the last task;
            `learned`: the mean over tasks 2, 3, ... of the score right after learning them;
            `product`: the largest strength * largest entry; `scales`: by rule, after the last
            consolidation but one, which is the one of the last penalty.
        """
        model, ewc = copy.deepcopy((self.model, self.ewc))
        start, learned, product, scales = time.perf_counter(), [], 0.0, {}
        for t in range(1, len(self.tasks)):
            if t > 1:
                consolidate(ewc, self.tasks[t - 1])
            curvature = [*curvature_of(ewc, self.setting).values()]
            scales = {name: each(curvature) for name, each in RULES.items()}
            ewc.strength = k / scales[rule]
            product = max(product, ewc.strength * scales["largest"])
            if not self._train(model, ewc, t, proximal=proximal):
                return self._diverged(start, product, scales)
            learned.append(self.tasks[t].score(model))
        final = [task.score(model) for task in self.tasks]
        if not all(map(math.isfinite, final)):
            return self._diverged(start, product, scales)
        return {
            "average": round(sum(final) / len(final), 2),
            "last": round(final[-1], 2),
            "learned": round(sum(learned) / len(learned), 2),
            "diverged": False,
            **_rest(start, product, scales),
        }

    def _train(self, model: nn.Module, ewc: EWC, t: int, *, proximal: bool) -> bool:
        seed = 1000 * self.seed + t
        return train(model, ewc, self.tasks[t], self.setting, seed, proximal=proximal)

    def _diverged(self, start: float, product: float, scales: dict[str, float]) -> dict[str, Any]:
        floor = self.tasks[0].floor
        scores = {"average": floor, "last": floor, "learned": floor, "diverged": True}
        return {**scores, **_rest(start, product, scales)}


def _rest(start: float, product: float, scales: dict[str, float]) -> dict[str, Any]:
    return {
        "product": float(f"{product:.4g}"),
        "scales": {name: float(f"{one:.4g}") for name, one in scales.items()},
        "seconds": round(time.perf_counter() - start, 2),
    }


class Results:
    """The runs so far, in a file of one line for each."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.machine, self.runs = machine("scikit-learn"), list[dict[str, Any]]()
        if path is not None and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            self.machine, self.runs = content["machine"], content["runs"]
        self._known = {self._key(one) for one in self.runs}

    @staticmethod
    def _key(run: dict[str, Any]) -> tuple[Any, ...]:
        return run["setting"], run["seed"], run["rule"], run["k"]

    def lacks(self, setting: str, seed: int, rule: str, k: float) -> bool:
        """Whether a run has not been made."""
        return (setting, seed, rule, k) not in self._known

    def add(self, run: dict[str, Any]) -> None:
        """Record a run."""
        self.runs.append(run)
        self._known.add(self._key(run))

    def save(self) -> None:
        """Write the file."""
        if self.path is not None:
            lines = ",\n".join(json.dumps(one) for one in self.runs)
            head = f'{{"machine": {json.dumps(self.machine)}, "runs": ['
            new = self.path.with_suffix(".new")  # so that what is killed here loses nothing
            new.write_text(f"{head}\n{lines}\n]}}\n", encoding="utf-8")
            new.replace(self.path)

    def best(self, setting: str) -> float:
        """The k of the rule `largest` with the best mean over seeds."""
        scores: dict[float, list[float]] = {}
        for one in self.runs:
            if one["setting"] == setting and one["rule"] == "largest" and one["k"] > 0:
                scores.setdefault(one["k"], []).append(one["average"])
        return max(scores, key=lambda k: sum(scores[k]) / len(scores[k]))


def measure(
    results: Results, names: Iterable[str], seeds: int, rules: Iterable[str], ks: int | None = None
) -> None:
    """Make the runs that are missing.

    Args:
        results: Where they are recorded.
        names: Of settings.
        seeds: How many.
        rules: Names of rules, or `"proximal"`.
        ks: How many constants of each rule's grid at most.
    """
    for rule in rules:
        for seed in range(seeds):
            for name in names:
                grid = _grid(results, name, rule)[:ks]
                missing = [k for k in grid if results.lacks(name, seed, rule, k)]
                if not missing:
                    continue
                sequel = Sequel(SETTINGS[name], seed)
                for k in missing:
                    proximal = rule == "proximal"
                    found = sequel.run("largest" if proximal else rule, k, proximal=proximal)
                    if k:
                        del found["scales"]  # those of k = 0 are shown; the file stays small
                    run = {"setting": name, "seed": seed, "rule": rule, "k": k, **found}
                    results.add(run)
                results.save()


def _grid(results: Results, name: str, rule: str) -> list[float]:
    if rule == "proximal":
        return [float(f"{times * results.best(name):.3g}") for times in TIMES]
    if rule == "largest":  # with SGD, the first k beyond the bound is enough
        return [k for k in GRIDS[rule] if k < 3 * SETTINGS[name].bound]
    return [*GRIDS[rule]]


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the tables, measure nothing")
    parser.add_argument("--quick", action="store_true", help="a minute; writes nothing")
    parser.add_argument("--write", action="store_true", help=f"also write into {PAGE.name}")
    parser.add_argument("--rules", nargs="*", default=[*GRIDS, "proximal"])
    parser.add_argument("--settings", nargs="*", default=[*SETTINGS], metavar="SETTING")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # for products this small, threads only wait for each other
    warnings.simplefilter("ignore")  # of a Fisher that is 0: outputs of other heads
    results = Results(None if arguments.quick else RESULTS)
    if arguments.quick:
        names = ["MLP, pixels, short", "LSTM, text, Adam"]
        measure(results, names, 1, ["largest", "proximal"])
    elif not arguments.table:
        measure(results, arguments.settings, arguments.seeds, arguments.rules)
    for name, text in report(results.runs).items():
        block = f"`python docs/benchmarks/strength.py --table`\n\n{text}\n\n{results.machine}."
        print(f"{name}\n\n{text}\n")
        if arguments.write:
            write(f"strength {name}", block, PAGE)


if __name__ == "__main__":
    main()
