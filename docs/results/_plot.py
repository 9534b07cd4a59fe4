"""What the pictures have in common: colours, font, and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a picture in a file needs no display
import matplotlib.pyplot as plt

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, GREEN, ORANGE, VERMILION = "#0072B2", "#009E73", "#E69F00", "#D55E00"
GREY = "#595959"


def new_figure(width: float, height: float) -> Any:
    """An empty figure; sizes in inches."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write the picture, white also on a dark page, and say where it is."""
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)
    print(f"Picture: {path}")
