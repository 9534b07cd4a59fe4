"""The parameters that have certain names now, and a cheap check that they still have them.

Users replace heads, wrap layers and move models between training steps. Resolving names walks the
model in Python, which is too slow for every step; comparing the dictionary entries on the way to
each parameter, and its dtype, shape and device, is not.
"""

from collections.abc import Iterable
from operator import attrgetter, getitem, is_
from typing import Any

from torch import nn

from ewc.model.names import Location, locate

_layout = attrgetter("dtype", "shape", "device")


class LiveParameters:
    """The parameters that have the given names in a model.

    Args:
        model: The unwrapped model.
        names: Names of parameters in the model.

    Attributes:
        names: The names.
        parameters: The parameters, in the order of `names`.
        by_name: The same, by name.
        locations: Where the model keeps them.

    Raises:
        ValueError: A module or a parameter has a dot in its own name, so that its parameters
            cannot be found by name.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        edges: dict[tuple[int, str], tuple[dict[str, Any], str, object]] = {}
        self.names = list(names)
        self.parameters: list[nn.Parameter] = []
        self.locations: list[Location] = []
        for name in self.names:
            location = locate(model, name)
            if location is None:
                raise ValueError(
                    "Modules and parameters must have names without a dot; found no path to "
                    f"{name!r}. Fix: rename the module or parameter that has a dot in its name, "
                    "or leave it out."
                )
            for registry, key in location.edges:
                edges[id(registry), key] = (registry, key, registry[key])
            self.parameters.append(location.parameter)
            self.locations.append(location)
        self.by_name = dict(zip(self.names, self.parameters, strict=True))
        self._edges = list(edges.values())
        # For the check in every step: see `is_current`.
        self._registries = [location.registry for location in self.locations]
        self._keys = [location.key for location in self.locations]
        self._layouts = list(map(_layout, self.parameters))

    def is_current(self) -> bool:
        """Whether the names still lead to these parameters, and none has changed its layout."""
        for registry, key, expected in self._edges:
            if key not in registry or registry[key] is not expected:
                return False
        # Without a loop in Python in the usual case, where nothing has changed: for a thousand
        # small parameters it would take longer than the penalty itself.
        try:
            found = map(getitem, self._registries, self._keys)
            unchanged = all(map(is_, found, self.parameters))
        except KeyError:
            return False
        if not unchanged and not all(map(Location.has, self.locations, self.parameters)):
            return False
        return list(map(_layout, self.parameters)) == self._layouts
