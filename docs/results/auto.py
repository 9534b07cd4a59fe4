"""`strength="auto"` against the best of a sweep, in the settings of the other pages.

`"auto"` is k / largest entry of the curvature after each consolidation, with one k for everything.
This script makes no runs: the other scripts have made them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import ewc_dr
import lora
import permuted
import speech
import van_de_ven
from _intervals import estimate, paired
from _study import FOLDER, Store, Study, chosen, swept, table

WORTH = 0.02
"""A share of a smaller gain is not shown."""


class Setting(NamedTuple):
    """A method of another script.

    Attributes:
        script: What has made the runs.
        method: The fields of the runs with a strength.
        none: The fields of the runs without a penalty.
    """

    script: str
    method: dict[str, Any]
    none: dict[str, Any]

    def values(self, scale: str) -> list[float]:
        """Accuracy on the test data of each seed: without a penalty, with "auto", or at best."""
        store = self.store
        if scale == "none":
            return store.values("test", **self.none)
        if scale == "auto":
            return store.values("test", **{**self.method, "scale": "auto"})
        return store.values("test", **self.method, strength=chosen(store, **self.method))

    @property
    def store(self) -> Store:
        """The runs of the script."""
        return _store(self.script)


@cache
def _store(script: str) -> Store:
    return Store(FOLDER / f"{script}.json")


def _permuted() -> Iterable[tuple[str, Setting]]:
    for optimizer, ending in (("SGD", ""), ("Adam", ", Adam")):
        for name in (permuted.EWC, permuted.ONLINE):
            fields = (permuted.key(f"{one}{ending}") for one in (name, permuted.NONE))
            yield (
                f"{name}: ten permuted MNISTs, one head, {optimizer}",
                Setting("permuted", *fields),
            )


def _split() -> Iterable[tuple[str, Setting]]:
    for noise, labels in ((van_de_ven.CLEAN, ""), (van_de_ven.NOISY, ", 20 % wrong labels")):
        fields = (
            van_de_ven.key(one, noise, "largest") for one in (van_de_ven.DEFAULT, van_de_ven.NONE)
        )
        yield f"OnlineEWC: Split MNIST, a head each{labels}, Adam", Setting("van_de_ven", *fields)


def _speech() -> Iterable[tuple[str, Setting]]:
    for name in speech.FISHERS:
        fields = ({"method": one} for one in (name, "none"))
        yield f"{speech.NAMES[name]}: speech, LSTM, a head each, Adam", Setting("speech", *fields)


def _lora() -> Iterable[tuple[str, Setting]]:
    for kind, outputs in (("split", "a head each"), ("turned", "one head")):
        for name in lora.AUTO:
            fields = ({"kind": kind, "method": one} for one in (name, lora.NONE))
            yield f"{name}: LoRA, {outputs}, Adam", Setting("lora", *fields)


def _growing() -> Iterable[tuple[str, Setting]]:
    for setting in ewc_dr.SETTINGS:
        fields = (
            {"setting": setting, "importance": one} for one in ("Fisher, empirical", ewc_dr.NONE)
        )
        yield f"EWC: EWC-DR's protocol, {setting}, SGD", Setting("ewc_dr", *fields)


def _one_head() -> Iterable[tuple[str, Setting]]:
    for memory, images in ((0, "no stored images"), (10, "ten stored images each")):
        fields = ({"ewc": one, "memory": memory} for one in (True, False))
        yield f"EWC: all digits, one head, {images}, Adam", Setting("one_head", *fields)


SETTINGS: dict[str, Setting] = dict(
    (*_permuted(), *_split(), *_speech(), *_lora(), *_growing(), *_one_head())
)


def comparison(_: Store) -> str:
    """Accuracy on the test data, on seeds that chose nothing."""
    rows = []
    for name, setting in SETTINGS.items():
        none, auto, best = (setting.values(scale) for scale in ("none", "auto", "best"))
        gained = [paired(each, none).mean for each in (auto, best)]
        strength = chosen(setting.store, **setting.method)
        rows.append(
            [
                name,
                estimate(none).text(digits=1),
                estimate(auto).text(digits=1),
                f"{strength:g}",
                estimate(best).text(digits=1),
                paired(auto, best).text(digits=1, sign=True),
                f"{100 * gained[0] / gained[1]:.0f}" if gained[1] >= WORTH else "-",
            ]
        )
    head = ["", "none", '"auto"', "best k", "best", '"auto" minus best']
    return table([*head, "share of the gain, %"], rows)


def sweep(_: Store) -> str:
    """Validation accuracy over k, on the seeds of tuning."""
    scores = {name: swept(one.store, **one.method) for name, one in SETTINGS.items()}
    grid = sorted({k for each in scores.values() for k in each})
    rows = [
        [name, *(f"{100 * each[k]:.1f}" if k in each else "" for k in grid)]
        for name, each in scores.items()
    ]
    return table(["validation accuracy, %, at k", *(f"{k:g}" for k in grid)], rows)


def tables(store: Store) -> Mapping[str, str]:
    """What the page shows."""
    return {"auto": comparison(store), "sweep": sweep(store)}


def run(store: Store, quick: bool) -> None:
    """Nothing: the runs are those of the other pages."""


STUDY = Study("auto", run, tables, stored="permuted")

if __name__ == "__main__":
    STUDY.main()
