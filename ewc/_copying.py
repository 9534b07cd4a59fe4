"""How an object is copied and pickled."""

import copy
from typing import Any

from typing_extensions import Self


class Copied:
    """A base class: without references into a live model; pickled without the process group."""

    def __getstate__(self) -> dict[str, Any]:
        # Process groups, and references into a live model, cannot be copied.
        return {**self.__dict__, "_binding": None, "_process_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = object.__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        other.__dict__["_process_group"] = self.__dict__["_process_group"]
        return other
