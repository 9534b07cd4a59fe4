"""Process groups of this process alone."""

from typing import Any

import torch.distributed as dist

KEPT: list[Any] = []
"""Groups that are not deleted: in PyTorch 2.6 the deletion waits, without releasing the GIL, for
threads of the group, which may need the GIL to free a tensor."""


def destroy() -> None:
    """Destroy the process groups of this process."""
    KEPT.append(dist.group.WORLD)
    dist.destroy_process_group()
