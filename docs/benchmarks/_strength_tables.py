"""The tables that `strength.py` prints from its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from _harness import table
from _strength_settings import SETTINGS

DEFAULT = ("largest", 10.0)
APART = ("proximal", "beyond")
"""What is no rule for a default."""
GRADIENT = (("largest", 1), ("beyond", 10), ("beyond", 100))
WITHIN = 3.0
"""Points: about as close to the best as three seeds can tell."""
LITTLE = 2.0
"""A possible gain below this many points is no measure of anything."""

Choice = tuple[str, float]  # a rule and its k


class Measured:
    """The runs of one setting, by rule and k.

    Args:
        name: Of the setting.
        runs: Of this setting, all seeds.
    """

    def __init__(self, name: str, runs: Iterable[dict[str, Any]]) -> None:
        self.name, self.setting = name, SETTINGS[name]
        self.runs: dict[Choice, list[dict[str, Any]]] = {}
        for run in runs:
            self.runs.setdefault((run["rule"], run["k"]), []).append(run)

    def of(self, choice: Choice) -> list[dict[str, Any]]:
        """The runs of all seeds."""
        return self.runs.get(choice, [])

    def mean(self, choice: Choice, what: str = "average") -> float:
        """Mean over seeds of `"average"`, `"last"` or `"learned"`; NaN if not measured."""
        return statistics.fmean([run[what] for run in self.of(choice)] or [math.nan])

    @cached_property
    def floor(self) -> float:
        """The score of a guess."""
        return self.setting.data(1, 0)[0].floor

    @cached_property
    def none(self) -> float:
        """The mean average score without EWC."""
        return self.mean(("largest", 0))

    @cached_property
    def best(self) -> Choice:
        """The rule and k with the best mean average score, of those run for every seed."""
        seeds = max(map(len, self.runs.values()))
        choices = [c for c in self.runs if c[0] not in APART and len(self.of(c)) == seeds]
        return max(choices, key=self.mean)

    def best_of(self, rule: str) -> Choice:
        """The best k of one rule."""
        choices = [one for one in self.runs if one[0] == rule and one[1] > 0]
        return max(choices, key=self.mean, default=(rule, math.nan))

    @cached_property
    def tuned(self) -> float:
        """What a search gives: for each seed, the score of the choice that is best on the others.

        The best of many noisy means is above the mean of any of them. This is not.
        """
        scores = {
            choice: {run["seed"]: run["average"] for run in runs}
            for choice, runs in self.runs.items()
            if choice[0] not in APART
        }
        seeds = set.intersection(*(set(by_seed) for by_seed in scores.values()))
        if len(seeds) < 2:
            return math.nan

        def found(seed: int) -> float:
            best = max(scores.values(), key=lambda one: sum(one[s] for s in seeds - {seed}))
            return best[seed]

        return statistics.fmean(found(seed) for seed in sorted(seeds))

    def behind(self, choice: Choice) -> float:
        """Points below the best."""
        return self.mean(self.best) - self.mean(choice)

    def share(self, choice: Choice) -> float:
        """The share of the possible gain; NaN where there is little to gain."""
        possible = self.mean(self.best) - self.none
        return (self.mean(choice) - self.none) / possible if possible > LITTLE else math.nan

    def newest(self, choice: Choice) -> float:
        """Points by which the last task is behind the same without EWC."""
        return self.mean(("largest", 0), "last") - self.mean(choice, "last")

    def deviation(self, choice: Choice) -> float:
        """The standard deviation over seeds of the average score."""
        scores = [run["average"] for run in self.of(choice)]
        return statistics.stdev(scores) if len(scores) > 1 else math.nan

    def diverged(self, choice: Choice) -> int:
        """Runs that are not finite, or at chance where there is more without EWC."""
        chance = self.floor + 3 < self.none - 10
        return sum(
            run["diverged"] or (chance and run["average"] < self.floor + 3)
            for run in self.of(choice)
        )


def by_setting(runs: Sequence[dict[str, Any]]) -> list[Measured]:
    """The settings that have been measured, in order."""
    return [
        Measured(name, (run for run in runs if run["setting"] == name))
        for name in SETTINGS
        if any(run["setting"] == name for run in runs)
    ]


def scores(settings: Sequence[Measured]) -> str:
    """The average score of each setting for each k of `k / largest`."""
    choices = sorted({c for one in settings for c in one.runs if c[0] == "largest"})
    lines = []
    for one in settings:
        cells = [_score(one, choice) for choice in choices]
        bound = "-" if one.setting.adaptive else f"{one.setting.bound:.0f}"
        lines.append([one.name, bound, *cells])
    return table(["setting", "SGD's bound of k", *(f"{k:g}" for _, k in choices)], lines)


def _score(one: Measured, choice: Choice) -> str:
    if not one.of(choice):
        return ""
    if count := one.diverged(choice):
        return f"({count} diverge)"
    text = f"{one.mean(choice):.1f}"
    return f"**{text}**" if choice == one.best_of("largest") else text


def rules(settings: Sequence[Measured], *, adaptive: bool) -> str:
    """Each rule and k, over all settings with SGD, or with Adam and AdamW."""
    group = [one for one in settings if one.setting.adaptive is adaptive]
    choices = sorted({c for one in group for c in one.runs if c[0] not in APART and c[1] > 0})
    lines = [_summed(choice, [one for one in group if one.of(choice)]) for choice in choices]
    head = ["rule", "k", "behind the best: mean", "worst", "within 3 points"]
    head += ["share of the gain", "over half", "last task, behind none: mean", "worst", "diverged"]
    return table(head, lines)


def _summed(choice: Choice, group: Sequence[Measured]) -> list[str]:
    behind = [one.behind(choice) for one in group]
    newest = [one.newest(choice) for one in group]
    shares = [share for one in group if math.isfinite(share := one.share(choice))]
    runs = sum(len(one.of(choice)) for one in group)
    return [
        choice[0],
        f"{choice[1]:g}",
        f"{statistics.fmean(behind):.1f}",
        f"{max(behind):.1f}",
        f"{sum(points <= WITHIN for points in behind)} of {len(group)}",
        f"{statistics.fmean(max(share, -1.0) for share in shares):.2f}" if shares else "-",
        f"{sum(share > 0.5 for share in shares)} of {len(shares)}",
        f"{statistics.fmean(newest):.1f}",
        f"{max(newest):.1f}",
        f"{sum(one.diverged(choice) for one in group)} of {runs}",
    ]


def default(settings: Sequence[Measured], choice: Choice = DEFAULT) -> str:
    """What a newcomer gets who sets nothing, setting by setting."""
    lines = []
    for one in settings:
        if not one.of(choice):
            continue
        share = one.share(choice)
        lines.append(
            [
                one.name,
                f"{one.none:.1f}",
                f"{one.mean(choice):.1f} ± {one.deviation(choice):.1f}",
                f"{one.mean(one.best):.1f} ({one.best[1]:g} / {one.best[0]})",
                f"{one.behind(choice):.1f}",
                f"{one.tuned - one.mean(choice):.1f}",
                f"{share:.2f}" if math.isfinite(share) else "-",
                f"{one.mean(('largest', 0), 'last'):.1f}",
                f"{one.mean(choice, 'last'):.1f}",
                f"{one.mean(one.best, 'last'):.1f}",
            ]
        )
    head = [
        "setting",
        "none",
        f"{choice[1]:g} / {choice[0]}",
        "best",
        "behind",
        "behind a search",
        "share",
    ]
    return table([*head, "last task: none", "default", "best"], lines)


def proximal(settings: Sequence[Measured]) -> str:
    """The proximal step beside the gradient of the penalty."""
    lines = []
    for one in settings:
        base, own = one.best_of("largest"), one.best_of("proximal")
        if math.isnan(own[1]):
            continue
        cells = [_beside(one, (r, float(f"{t * base[1]:.3g}"))) for r, t in GRADIENT]
        cells += [
            _beside(one, ("proximal", float(f"{t * base[1]:.3g}"))) for t in (0.1, 1, 10, 100, 1000)
        ]
        difference = one.mean(own) - one.mean(base)
        lines.append([one.name, f"{base[1]:g}", *cells, f"{difference:+.1f}"])
    head = ["setting", "best k", *(f"gradient, x {t}" for t in ("1", "10", "100"))]
    head += [f"proximal, x {t}" for t in ("0.1", "1", "10", "100", "1000")]
    return table([*head, "proximal's best - gradient's"], lines)


def _beside(one: Measured, choice: Choice) -> str:
    count = one.diverged(choice)
    return f"({count} diverge)" if count else f"{one.mean(choice):.1f}"


def report(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """All tables by name, as Markdown."""
    settings = by_setting(runs)
    return {
        "scores": scores(settings),
        "sgd": rules(settings, adaptive=False),
        "adam": rules(settings, adaptive=True),
        "default": default(settings),
        "proximal": proximal(settings),
    }
