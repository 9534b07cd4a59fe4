"""`strength="auto"` against the best of a sweep, in the settings of the other pages.

`"auto"` is k / largest entry of the curvature after each consolidation, with one k for everything.
This script makes no runs: the other scripts have made them.
"""

from __future__ import annotations

from collections.abc import Mapping

from _intervals import estimate, paired
from _study import FOLDER, Store, Study, chosen, swept, table
from permuted import EWC, NONE

SETTINGS: dict[str, tuple[str, str, str]] = {
    "ten permuted MNISTs, one head, SGD": ("permuted", EWC, NONE),
    "the same, Adam": ("permuted", f"{EWC}, Adam", f"{NONE}, Adam"),
}
"""The script that has made the runs, the name of the method there, and that of none."""


def _runs(setting: str, scale: str) -> list[float]:
    script, method, none = SETTINGS[setting]
    name = none if scale == "none" else method
    return Store(FOLDER / f"{script}.json").values("test", method=name, scale=scale)


def comparison(_: Store) -> str:
    """Accuracy on the test data, on seeds that chose nothing."""
    rows = []
    for setting, (script, method, _) in SETTINGS.items():
        none, auto, best = (_runs(setting, scale) for scale in ("none", "auto", "largest"))
        store = Store(FOLDER / f"{script}.json")
        gains = [estimate(each).mean - estimate(none).mean for each in (auto, best)]
        rows.append(
            [
                setting,
                estimate(none).text(digits=1),
                estimate(auto).text(digits=1),
                f"{chosen(store, method=method, scale='largest'):g}",
                estimate(best).text(digits=1),
                paired(auto, best).text(digits=1, sign=True),
                f"{100 * gains[0] / gains[1]:.0f}",
            ]
        )
    head = ["", "none", '"auto"', "best k", "best", '"auto" minus best', "share of the gain, %"]
    return table(head, rows)


def sweep(_: Store) -> str:
    """Validation accuracy over k, on the seeds of tuning."""
    scores = {}
    for setting, (script, method, _) in SETTINGS.items():
        scores[setting] = swept(Store(FOLDER / f"{script}.json"), method=method, scale="largest")
    grid = sorted({k for each in scores.values() for k in each})
    rows = [
        [setting, *(f"{100 * each[k]:.1f}" if k in each else "" for k in grid)]
        for setting, each in scores.items()
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
