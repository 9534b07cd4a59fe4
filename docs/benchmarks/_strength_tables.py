"""The tables that `strength.py` prints from its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from _harness import table
from _strength_settings import SETTINGS

DEFAULT = ("largest", 5.0)
RULES = ("largest", "top", "weighted", "mean", "layers")
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

    def scale(self, rule: str) -> float:
        """The scale of the curvature without EWC, by one of the rules: the median over seeds."""
        return statistics.median(run["scales"][rule] for run in self.of(("largest", 0)))

    @cached_property
    def none(self) -> float:
        """The mean average score without EWC."""
        return self.mean(("largest", 0))

    @cached_property
    def complete(self) -> list[Choice]:
        """What was run for every seed."""
        seeds = max(map(len, self.runs.values()))
        return [choice for choice, runs in self.runs.items() if len(runs) == seeds]

    @cached_property
    def best(self) -> Choice:
        """The rule and k with the best mean average score."""
        return max((choice for choice in self.complete if choice[0] in RULES), key=self.mean)

    def best_of(self, rule: str) -> Choice:
        """The best k of one rule."""
        choices = [one for one in self.complete if one[0] == rule and one[1] > 0]
        return max(choices, key=self.mean, default=(rule, math.nan))

    def searched(self, rules: Sequence[str] = RULES) -> float:
        """What a search gives: for each seed, the score of the choice that is best on the others.

        The best of many noisy means is above the mean of any of them. This is not.
        """
        scores = {
            choice: {run["seed"]: run["average"] for run in runs}
            for choice, runs in self.runs.items()
            if choice[0] in rules and choice in self.complete
        }
        seeds = {run["seed"] for runs in self.runs.values() for run in runs}
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
        lines.append([one.name, bound, f"{one.scale('largest'):.1g}", *cells])
    return table(
        ["setting", "SGD's bound of k", "largest entry", *(f"{k:g}" for _, k in choices)], lines
    )


def _score(one: Measured, choice: Choice) -> str:
    if not one.of(choice):
        return ""
    if count := one.diverged(choice):
        return f"({count} diverge)"
    text = f"{one.mean(choice):.1f}"
    return f"**{text}**" if choice == one.best_of("largest") else text


def scales(settings: Sequence[Measured]) -> str:
    """How many times smaller than the largest entry the scales of the rules are."""
    lines = []
    for rule in RULES[1:]:
        ratios = [one.scale("largest") / one.scale(rule) for one in settings]
        lines.append([rule, *(f"{f(ratios):.1f}" for f in (min, statistics.median, max))])
    return table(["largest entry / scale", "least", "median", "most"], lines)


def rules(settings: Sequence[Measured], *, adaptive: bool) -> str:
    """Each rule and k, over all settings with SGD, or with Adam and AdamW."""
    group = [one for one in settings if one.setting.adaptive is adaptive]
    choices = sorted({c for one in group for c in one.complete if c[0] in RULES and c[1] > 0})
    lines = []
    for choice in choices:
        measured = [one for one in group if choice in one.complete]
        if choice[0] == "largest" or len(measured) == len(group):
            lines.append(_summed(choice, measured))
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
                f"{one.searched() - one.mean(choice):.1f}",
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
    differences: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for one in settings:
        base, own = one.best_of("largest"), one.best_of("proximal")
        if math.isnan(own[1]):
            continue
        cells = [_above(one, times * base[1]) for times in (1, 10, 100)]
        cells += [
            _beside(one, ("proximal", float(f"{t * base[1]:.3g}"))) for t in (0.1, 1, 10, 100, 1000)
        ]
        differences[one.setting.adaptive].append(
            (one.mean(own) - one.mean(base), one.searched(["proximal"]) - one.searched(["largest"]))
        )
        lines.append(
            [one.name, f"{base[1]:g}", *cells, *_signed(differences[one.setting.adaptive][-1])]
        )
    blank = [""] * 9
    for adaptive, found in differences.items():
        if not found:
            continue
        name = "mean with Adam and AdamW" if adaptive else "mean with SGD"
        lines.append(
            [name, *blank, *_signed([statistics.fmean(x) for x in zip(*found, strict=True)])]
        )
    head = ["setting", "best k", *(f"gradient, x {t}" for t in ("1", "10", "100"))]
    head += [f"proximal, x {t}" for t in ("0.1", "1", "10", "100", "1000")]
    return table([*head, "proximal - gradient: best", "after a search"], lines)


def _signed(points: Iterable[float]) -> list[str]:
    return [f"{one:+.1f}" for one in points]


def _above(one: Measured, k: float) -> str:
    """With the smallest k that was measured from this one on."""
    measured = [choice for choice in one.complete if choice[0] == "largest" and choice[1] >= k]
    if not measured:
        return "-" if one.setting.adaptive else "beyond the bound"
    return _beside(one, min(measured))


def _beside(one: Measured, choice: Choice) -> str:
    if choice not in one.complete:
        return "-"
    count = one.diverged(choice)
    return f"({count} diverge)" if count else f"{one.mean(choice):.1f}"


def report(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """All tables by name, as Markdown."""
    settings = by_setting(runs)
    return {
        "scores": scores(settings),
        "scales": scales(settings),
        "sgd": rules(settings, adaptive=False),
        "adam": rules(settings, adaptive=True),
        "default": default(settings),
        "proximal": proximal(settings),
    }
