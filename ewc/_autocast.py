"""Autocast, switched off where the library computes in the precision that it promises."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def without_autocast(device_types: Iterable[str]) -> Iterator[None]:
    """Switch autocast off on these device types, where it is on."""
    with ExitStack() as stack:
        for device_type in device_types:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
