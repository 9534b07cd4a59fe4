"""Some libraries leave a process group behind, which other tests would find."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
