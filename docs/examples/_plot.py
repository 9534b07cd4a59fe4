"""What the pictures of the gallery have in common: colours, font, and how they are saved."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a picture in a file needs no display
import matplotlib.pyplot as plt

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, GREEN, ORANGE, VERMILION = "#0072B2", "#009E73", "#E69F00", "#D55E00"
GREY, PALE = "#595959", "#dddddd"


def arguments(file: str, description: str | None) -> argparse.Namespace:
    """The options of an example: `--out FILE.png` and `--seed N`."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    out = Path(file).with_suffix(".png").name
    parser.add_argument("--out", type=Path, default=Path(out), help="picture (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    return parser.parse_args()


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
