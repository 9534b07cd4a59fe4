"""What some of these libraries need, and what some leave behind."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.torchvision import import_torchvision

import_torchvision()  # before a library looks for it


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
