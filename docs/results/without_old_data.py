"""A language model is fine-tuned without its old data: what must the Fisher be computed from?

A transformer of characters learns the King James Bible and Python code, and is then fine-tuned on
Wycliffe's Bible. The Fisher that protects it is computed from the old texts, from texts that the
model writes itself, from the new text or random characters with characters drawn from the model's
predictions, or from one of the old texts alone; the controls are a Fisher whose entries are
shuffled within each parameter, and a plain pull towards the old weights (L2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from _intervals import estimate
from _language import (
    BATCH,
    LENGTH,
    LoRA,
    Transformer,
    adapted,
    bits,
    split,
    train,
    written,
)
from _protection import protected
from _study import IMAGES, Store, Study, table
from _texts import OTHER, START, Text, bible, code
from torch import Tensor

from ewc import Classification, TimeSeries, diagonal_fisher

SEEDS = range(5)
NONE = "none"
OLD, OWN, NEW, RANDOM = "old texts", "own samples", "new text", "random characters"
KJV, CODE, SHUFFLED, L2 = "King James alone", "code alone", "old texts, shuffled", "L2"
SOURCES = {
    "all weights": (OLD, OWN, NEW, RANDOM, KJV, CODE, SHUFFLED, L2),
    "LoRA": (OLD, OWN, L2),
}
RATES = {"all weights": 2e-3, "LoRA": 5e-3}
GRID = WEAK, STRONG = 0.03, 0.1
"""strength = k / mean entry of the Fisher."""
SAMPLES = 256  # windows that a Fisher is computed from, and that are validated and tested by
PRETRAINING, STEPS = 3000, 200
LIKELIHOOD = TimeSeries(Classification(), batch_first=True)


def _no_penalty(at: Mapping[str, Tensor] | None = None) -> float:
    return 0.0


@cache
def texts() -> dict[str, Text]:
    """Two that are old, and one that is new."""
    return {"kjv": Text(bible("kjv")), "code": Text(code()), "new": Text(bible("wyc"))}


class Pretrained:
    """A model of the old texts, and the Fisher estimates that may protect it.

    Args:
        seed: Of the parameters and of everything that is drawn.
        steps: Of pretraining.
        samples: Windows of each Fisher, of validation and of tests.
    """

    def __init__(self, seed: int, steps: int = PRETRAINING, samples: int = SAMPLES) -> None:
        torch.manual_seed(seed)
        self.seed, self.samples = seed, samples
        self.generator = torch.Generator().manual_seed(seed)
        self.held_out = {
            part: {name: self._windows(name, samples, part) for name in texts()}
            for part in ("validation", "test")
        }
        self.model = Transformer()
        train(self.model, lambda: self._old(BATCH), steps, 3e-3)
        self.fishers = {name: self._fisher(name) for name in SOURCES["all weights"]}

    def _windows(self, name: str, number: int, part: str = "train") -> Tensor:
        return texts()[name].windows(part, number, LENGTH, self.generator)

    def _old(self, number: int) -> Tensor:
        """Windows of both old texts, half and half."""
        return torch.cat([self._windows(name, number // 2) for name in ("kjv", "code")])

    def _fisher(self, name: str) -> dict[str, Tensor]:
        """A Fisher, divided by the mean of its entries."""
        if name == SHUFFLED:
            return {key: self._shuffled(one) for key, one in self._fisher(OLD).items()}
        if name == L2:
            return {key: torch.ones_like(one) for key, one in self.model.named_parameters()}
        drawn = name in (NEW, RANDOM)  # the characters to predict are drawn from the model
        fisher = diagonal_fisher(
            self.model,
            [split(self._source(name))],
            LIKELIHOOD,
            fisher_type="mc" if drawn else "empirical",
            generator=self.generator if drawn else None,
        )
        mean = torch.cat([one.flatten() for one in fisher.values()]).mean()
        return {key: one / mean for key, one in fisher.items()}

    def _source(self, name: str) -> Tensor:
        """The windows that a Fisher is computed from."""
        number = self.samples
        if name == OWN:
            return written(self.model, number, self.generator)
        if name == RANDOM:
            characters = torch.randint(OTHER, (number, LENGTH), generator=self.generator)
            return torch.cat([torch.full((number, 1), START), characters], 1)
        if name == OLD:
            return self._old(number)
        return self._windows({KJV: "kjv", CODE: "code", NEW: "new"}[name], number)

    def _shuffled(self, entries: Tensor) -> Tensor:
        order = torch.randperm(entries.numel(), generator=self.generator)
        return entries.flatten()[order].view_as(entries)

    def likeness(self, name: str) -> dict[str, float]:
        """The correlation with the old texts' Fisher, over entries, of their logarithms."""
        logs = [
            torch.cat([one.flatten() for one in self.fishers[each].values()]).clamp_min(1e-6).log()
            for each in (OLD, name)
        ]
        return {"correlation": round(float(torch.corrcoef(torch.stack(logs))[0, 1]), 4)}

    def fine_tune(self, trained: str, source: str, k: float, steps: int = STEPS) -> dict[str, Any]:
        """Learn the new text.

        Args:
            trained: All weights, or those of LoRA.
            source: Which Fisher protects the old ones.
            k: How strongly.
            steps: Of fine-tuning.

        Returns:
            `scores` of the model after it.
        """
        torch.manual_seed(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        base = copy.deepcopy(self.model)
        model, penalty = self._protected(base, trained, source, k)

        def batch() -> Tensor:
            return texts()["new"].windows("train", BATCH, LENGTH, generator)

        train(model, batch, steps, RATES[trained], penalty)
        return self.scores(model)

    def _protected(
        self, base: Transformer, trained: str, source: str, k: float
    ) -> tuple[torch.nn.Module, Callable[[], Tensor | float]]:
        """What is trained, and its penalty; of LoRA, that of the weights that it makes."""
        lora = trained == "LoRA"
        penalty: Callable[..., Tensor | float] = _no_penalty
        if source != NONE:
            names = adapted(base) if lora else [name for name, _ in base.named_parameters()]
            fisher = {name: self.fishers[source][name] for name in names}
            penalty = protected(base, LIKELIHOOD, fisher, k)
        if not lora:
            return base, penalty
        adapter = LoRA(base)
        return adapter, lambda: penalty(at=adapter.weights())

    def scores(self, model: torch.nn.Module) -> dict[str, Any]:
        """Bits per character of held-out text: `test`, and `validation` to choose a strength by."""
        return {
            part: {name: round(bits(model, one), 4) for name, one in windows.items()}
            for part, windows in self.held_out.items()
        }


def run(store: Store, quick: bool) -> None:
    """All runs; the quick form has two seeds, and few steps."""
    for seed in SEEDS[:2] if quick else SEEDS:
        _run(store, seed, quick)


def _run(store: Store, seed: int, quick: bool) -> None:
    """All runs of a seed."""
    pretraining, steps, samples = (20, 5, 16) if quick else (PRETRAINING, STEPS, SAMPLES)

    @cache
    def model() -> Pretrained:
        return Pretrained(seed, pretraining, samples)

    store.run(lambda: model().scores(model().model), trained="before", seed=seed)
    for name in SOURCES["all weights"][:-1]:  # L2 is the same everywhere
        store.run(lambda n=name: model().likeness(n), likeness=name, seed=seed)
    for trained, sources in SOURCES.items():
        for source, k in [(NONE, 0.0), *((one, k) for k in GRID for one in sources)]:
            key = {"trained": trained, "source": source, "k": k}
            store.run(lambda one=key: model().fine_tune(**one, steps=steps), **key, seed=seed)


# Tables -------------------------------------------------------------------------------------


def average(scores: Mapping[str, float]) -> float:
    """Of old and new, the two old texts together."""
    return (old(scores) + scores["new"]) / 2


def old(scores: Mapping[str, float]) -> float:
    """Bits per character of both old texts."""
    return (scores["kjv"] + scores["code"]) / 2


def column(store: Store, of: Callable[[Mapping[str, float]], float], **key: Any) -> list[float]:
    """A number of each seed, from its test data."""
    runs = sorted(store.select(**key), key=lambda one: one["seed"])
    return [of(one["test"]) for one in runs]


def gaps(store: Store, trained: str, source: str) -> list[float]:
    """How many more bits the old texts cost than with their own Fisher, for each seed.

    Both are compared where the new text costs the same: what it costs with `WEAK`, by the Fisher
    estimate with which it costs more. The other's old bits are read on the line between its two
    strengths. The curve bends below that line, to the other's disadvantage (a few thousandths).
    """
    mine = _ends(store, trained, source)
    reference = _ends(store, trained, OLD)
    found = []
    for one, other in zip(mine, reference, strict=True):
        if one[0][0] >= other[0][0]:
            found.append(one[0][1] - _at(other, one[0][0]))
        else:
            found.append(_at(one, other[0][0]) - other[0][1])
    return found


Point = tuple[float, float]


def _ends(store: Store, trained: str, source: str) -> list[tuple[Point, Point]]:
    """For each seed, bits on the new and the old texts with each of the two strengths."""
    columns = [
        column(store, of, trained=trained, source=source, k=k)
        for k in (WEAK, STRONG)
        for of in (_score("new"), old)
    ]
    return [((a, b), (c, d)) for a, b, c, d in zip(*columns, strict=True)]


def _at(ends: tuple[Point, Point], new: float) -> float:
    (x0, y0), (x1, y1) = ends
    return y0 if x0 == x1 else y0 + (y1 - y0) * (new - x0) / (x1 - x0)


def tables(store: Store) -> dict[str, str]:
    """By name."""
    return {"all": _table(store, "all weights"), "lora": _table(store, "LoRA")}


def _table(store: Store, trained: str) -> str:
    head = ["Fisher from", "k", "King James", "code", "Wycliffe (new)", "average"]
    head += ["old texts, at equal learning, beside the old texts' Fisher", "correlation"]
    names = [_score(name) for name in ("kjv", "code", "new")]
    before = [_text(column(store, of, trained="before")) for of in (*names, average)]
    rows = [["before", "", *before, "", ""]]
    for source, k in [(NONE, 0.0), *((one, k) for one in SOURCES[trained] for k in GRID)]:
        key = {"trained": trained, "source": source, "k": k}
        cells = [_text(column(store, of, **key)) for of in (*names, average)]
        gap = likeness = ""
        if k == WEAK:
            gap = estimate(gaps(store, trained, source)).text(1, 3, sign=True)
            found = [one["correlation"] for one in store.select(likeness=source)]
            likeness = estimate(found).text(1, 2) if found else ""
        rows.append([source, f"{k:g}" if k else "", *cells, gap, likeness])
    return table(head, rows)


def draw(store: Store) -> None:
    """What is kept against what is learned; a line for each Fisher, a point for each strength."""
    from _plot import BLUE, GREEN, GREY, ORANGE, VERMILION, new_figure, save

    colours = dict(zip(SOURCES["all weights"], (BLUE, GREEN, ORANGE, VERMILION), strict=False))
    colours |= {KJV: "#56B4E9", CODE: "#CC79A7", SHUFFLED: "black", L2: GREY}
    figure = new_figure(10.5, 4.6)
    axes = figure.subplots(1, len(SOURCES), sharey=True)
    for axis, (trained, sources) in zip(axes, SOURCES.items(), strict=True):
        for source in sources:
            found = []
            for k in (0.0, *GRID):
                key = {"trained": trained, "source": source if k else NONE, "k": k}
                found.append(
                    [estimate(column(store, of, **key)).mean for of in (_score("new"), old)]
                )
            x, y = zip(*found, strict=True)
            style = {"color": colours[source], "marker": "o", "markersize": 4, "label": source}
            axis.plot(x, y, linestyle="--" if source in (SHUFFLED, L2) else "-", **style)
        kept = estimate(column(store, old, trained="before")).mean
        axis.axhline(kept, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_title(trained, loc="left", weight="bold")
        axis.set_xlabel("new text, bits per character")
    axes[0].set_ylabel("old texts, bits per character")
    axes[0].legend(frameon=False, fontsize=9)
    save(figure, IMAGES / "results_without_old_data.png")


def _score(name: str) -> Callable[[Mapping[str, float]], float]:
    return lambda scores: scores[name]


def _text(values: list[float]) -> str:
    return estimate(values).text(1, 2)


STUDY = Study("without_old_data", run, tables, draw)


if __name__ == "__main__":
    STUDY.main()
