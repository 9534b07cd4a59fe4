"""The diagonal Fisher as a picture.

Only this module needs matplotlib, and it is imported by the first call.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ewc._ewc import EWC
from ewc._summary import ROWS, Curvature, combined, group_by_layer, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DECADES = 12  # below the largest entry; smaller ones do not protect anything
_BINS = 6 * _DECADES
_BLUE = "#0072B2"
_VERMILION = "#D55E00"


def plot_fisher(ewc: EWC, *, rows: int = ROWS) -> "Figure":
    """Draw the distribution of the diagonal Fisher over the layers and within them.

    There is one row for each parameter or, if there are too many, for each layer, as in
    `Summary.table`. The left part shows how the entries of the row are distributed over orders of
    magnitude, from `largest / 10^12` on: a darker color means more entries, and marks show the mean
    and the largest entry. The right part shows the share of the row in the trace.

    Args:
        ewc: An `EWC` or `OnlineEWC` that has consolidated a task. Its `fisher` is drawn, without
            the prior of `OnlineEWC`.
        rows: The most rows, `>= 1`.

    Returns:
        A figure of pyplot, for `.savefig(path)` or `plt.show()`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: An argument has a wrong type.
        ValueError: `rows` is less than 1, or there is nothing to draw.
    """
    pyplot = _pyplot()
    if not isinstance(ewc, EWC):
        raise TypeError(f"ewc must be an EWC or OnlineEWC; found {type(ewc).__name__}.")
    fisher = ewc.fisher
    curvatures = measure(fisher)
    total = combined(curvatures.values())
    if not total.largest > 0:
        raise ValueError(
            "The Fisher to draw must have an entry that is not zero; found none after "
            f"{ewc.n_tasks} consolidations. Fix: call consolidate first."
        )
    groups = group_by_layer(curvatures, rows)
    found = [combined(curvatures[name] for name in names) for names in groups.values()]
    top = math.log10(total.largest)
    histograms = [_histogram([fisher[name] for name in names], top) for names in groups.values()]

    figure: Figure = pyplot.figure(figsize=(9, 1.6 + 0.27 * len(groups)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    _draw_histograms(left, list(groups), histograms, found, top)
    _draw_shares(right, found, total)
    tasks = "1 task" if ewc.n_tasks == 1 else f"{ewc.n_tasks} tasks"
    figure.suptitle(f"Fisher information after {tasks}", x=0.01, ha="left", weight="bold")
    return figure


def _histogram(tensors: list[Tensor], top: float) -> Tensor:
    """The number of entries in each bin from `10^(top - _DECADES)` to `10^top`: `[_BINS]`.

    Smaller entries, most of them 0, are in no bin.
    """
    bottom = top - _DECADES
    counts = torch.zeros(_BINS, dtype=torch.float64)
    for tensor in tensors:
        # Clamped, because log10(0) is -inf, and rounding must not put the largest above the top.
        magnitudes = tensor.log10().clamp(bottom - 1, top)
        counts += torch.histc(magnitudes, _BINS, bottom, top).to(counts)
    return counts


def _draw_histograms(
    axis: Any, labels: list[str], histograms: list[Tensor], found: list[Curvature], top: float
) -> None:
    """A strip for each row, darker where there are more entries; marks for mean and largest."""
    bottom = top - _DECADES
    for row, (counts, one) in enumerate(zip(histograms, found, strict=True)):
        darkness = counts / counts.max().clamp_min(1)
        axis.imshow(
            darkness[None].numpy(),
            extent=(bottom, top, row + 0.36, row - 0.36),
            cmap="Blues",
            vmin=0,
            vmax=1.3,  # so that the marks stay visible
            aspect="auto",
            interpolation="nearest",
        )
        below = 1 - float(counts.sum()) / one.entries if one.entries else 0.0
        if below >= 0.005:
            axis.text(bottom + 0.1, row, f"{below:.0%} at or near 0", va="center", fontsize=8)
    rows = [row for row, one in enumerate(found) if one.largest > 0]
    means = [math.log10(found[row].mean) for row in rows]
    largest = [math.log10(found[row].largest) for row in rows]
    axis.plot(means, rows, "|", color="black", markersize=11, markeredgewidth=2, label="mean")
    axis.plot(largest, rows, "o", color=_VERMILION, markersize=5, label="largest")
    axis.set(xlim=(bottom, top + 0.3), ylim=(len(labels) - 0.5, -0.5))
    decades = range(math.ceil(bottom), math.floor(top) + 1, 2)
    axis.set_xticks(list(decades), [f"$10^{{{decade}}}$" for decade in decades])
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xlabel("Fisher of an entry (the darker, the more entries)")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _draw_shares(axis: Any, found: list[Curvature], total: Curvature) -> None:
    """A bar for each row's share of the trace."""
    shares = [100 * one.trace / total.trace for one in found]
    bars = axis.barh(range(len(found)), shares, height=0.72, color=_BLUE)
    axis.bar_label(bars, [f"{share:.1f}" for share in shares], padding=3, fontsize=8)
    axis.set(xlim=(0, 1.2 * max(shares)), xlabel="share of the trace (%)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0, labelleft=False)


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError(
            "matplotlib must be installed to draw; found none. Fix: pip install matplotlib."
        ) from error
    return matplotlib.pyplot
