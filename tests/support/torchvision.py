"""torchvision beside a build of torch for the CPU alone."""

import importlib.util
import re

import torch


def import_torchvision() -> None:
    """Import it, if it is installed, also where its operators were compiled for another torch.

    Some libraries need its transforms or data sets. Nothing here needs its operators; but without
    them (a build of torch for the CPU alone) its import fails.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    while True:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing[1], "() -> ()")
        else:
            return
