"""The failures that processes report to each other, outside of all collectives."""

import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from ewc.processes.layout import Groups

_INTERVAL = 0.1  # seconds between two looks for the reports of others
_PATIENCE = 1.0  # seconds to wait for a report that is known to come

_calls: dict[str, int] = {}
"""For each process group, how often its processes have started something together."""


class Reports:
    """The failures of one call that several processes make together.

    They lie in the key-value store through which the process groups were set up. So a process that
    computes can look for them without waiting, and one that has left need not be asked.

    Args:
        groups: The process groups; a failure is reported to the members of each.
    """

    def __init__(self, groups: Groups) -> None:
        # Absent where processes were not set up through a store (MPI).
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._keys: list[str] = []
        self._looked = float("-inf")
        self._are_known = False
        for group in groups:
            _calls[group.group_name] = _calls.get(group.group_name, 0) + 1
            self._keys.append(f"ewc/{group.group_name}/{_calls[group.group_name]}")

    def add(self, failure: str, keys: list[str] | None = None) -> None:
        """Report a failure."""
        if self._store is None:
            return
        for key in self._keys if keys is None else keys:
            index = self._store.add(f"{key}/count", 1)
            self._store.set(f"{key}/{index}", failure)

    def are_known(self) -> bool:
        """Whether a process has reported a failure; looks only from time to time."""
        if not self._are_known and self._may_look():
            self._are_known = any(map(self._exist, self._keys))
        return self._are_known

    def read(self) -> list[str]:
        """The failures that were reported; passed on where nobody has heard of them."""
        deadline = time.monotonic() + _PATIENCE
        while not any(map(self._exist, self._keys)) and time.monotonic() < deadline:
            time.sleep(_INTERVAL / 10)
        found = self._found()
        unheard = [key for key in self._keys if not self._exist(key)]
        for failure in found:
            self.add(failure, unheard)
        return found

    def tell_of_an_interrupt(self) -> bool:
        """Whether a process is known to have been interrupted; looks only from time to time."""
        return (
            self.are_known()
            and self._may_look()
            and any(": KeyboardInterrupt: " in each for each in self._found())
        )

    def _may_look(self) -> bool:
        """Whether the last look is long enough ago; then this is the next one."""
        now = time.monotonic()
        if now - self._looked < _INTERVAL:
            return False
        self._looked = now
        return True

    def _found(self) -> list[str]:
        found: dict[str, None] = {}
        for key in filter(self._exist, self._keys):
            index = 1
            while self._store.check([f"{key}/{index}"]):
                found[self._store.get(f"{key}/{index}").decode()] = None
                index += 1
        return list(found)

    def _exist(self, key: str) -> bool:
        with suppress(RuntimeError):  # the process that holds the store may be gone
            return self._store is not None and bool(self._store.check([f"{key}/1"]))
        return False
