"""Several processes, of which there may be only one as yet.

Batches sharded over processes would need their sums added up over all of them. As long as that is
not done, each process would protect what its own shard says, without a word: it is refused.
"""

from typing import Any

import torch


def refuse_several_processes(process_group: Any) -> None:
    """Refuse a consolidation whose batches are sharded over several processes.

    Args:
        process_group: The user's; None for the world, if it is initialised.

    Raises:
        NotImplementedError: The group has more than one rank.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return
    ranks = distributed.get_world_size(process_group)
    if ranks > 1:
        raise NotImplementedError(
            "A consolidation runs in one process; found a process group of "
            f"{ranks} ranks, over which nothing would be summed: each rank would protect another "
            "Fisher. Let every rank run through all the data and pass a group of one rank to the "
            "constructor, process_group=torch.distributed.new_subgroups(group_size=1)[0]."
        )
