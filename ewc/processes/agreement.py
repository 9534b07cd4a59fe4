"""Whether all processes have the same: options, and the values of tensors, by checksum."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ewc.processes.layout import is_sharded, local
from ewc.processes.ranks import Ranks

_BLOCK = 2**20  # entries whose checksum is computed at once
_SHOWN = 10  # differences that an error lists
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR, _OFFSET = 6364136223846793005, 1442695040888963407  # of Knuth's MMIX generator


def agree(
    ranks: Ranks, values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Check that all processes have the same. An exchange of its own.

    Args:
        ranks: The processes.
        values: What is compared by its `repr`, by name.
        tensors: What is compared bit for bit, by name. Of a sharded tensor, each process compares
            its part with those of the processes that hold the same part.

    Raises:
        ValueError: Some differ; they are listed.
    """
    if not ranks.is_distributed:
        return
    own = {"": {key: repr(value) for key, value in values.items()}}
    for (name, tensor), checksum in zip(
        (tensors or {}).items(), _checksums(list((tensors or {}).values())), strict=True
    ):
        own.setdefault(_part(tensor), {})[name] = f"checksum {checksum}"
    # Everything by name would be much to send, and is only needed for the error.
    digests = {part: zlib.crc32(repr(found).encode()) for part, found in own.items()}
    everyone = ranks.gather("what must be the same", (dist.get_rank(), digests))
    parts = dict.fromkeys(part for _, found in everyone for part in found)
    if all(len({found[part] for _, found in everyone if part in found}) == 1 for part in parts):
        return
    details = ranks.gather("what differs", (dist.get_rank(), own))
    problems: dict[str, None] = {}
    for part in parts:
        sharing = [(rank, found[part]) for rank, found in details if part in found]
        problems.update(dict.fromkeys(_differing(sharing)))
    shown = [f"  - {problem}" for problem in list(problems)[:_SHOWN]]
    if len(problems) > _SHOWN:
        shown.append(f"  - and {len(problems) - _SHOWN} more")
    raise ValueError(
        "Model, object and arguments must be the same on every process; found differences in\n"
        + "\n".join(shown)
        + "\nFix: build the model and the object, and call consolidate, in the same way on all "
        "processes. Checksums of values differ where the weights are not kept equal, as "
        "DistributedDataParallel does, or where other states were loaded."
    )


def _differing(everyone: list[tuple[int, dict[str, str]]]) -> list[str]:
    """Descriptions of the entries that differ between processes, `(rank, entries)` each."""
    problems = []
    for key in dict.fromkeys(key for _, own in everyone for key in own):
        found: dict[str, list[int]] = {}
        for rank, own in everyone:
            found.setdefault(own.get(key, "None"), []).append(rank)
        if len(found) > 1:
            shown = "; ".join(f"{value} on {_listed(some)}" for value, some in found.items())
            problems.append(f"{key}: {shown}")
    return problems


def _part(tensor: Tensor) -> str:
    """Which part of a sharded tensor this process holds, as text; empty for all of it."""
    if not is_sharded(tensor):
        return ""
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    coordinates = [
        f"{mesh.get_local_rank(dim)} of {mesh.size(dim)} in dimension {dim}"
        for dim, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    ]
    return "; ".join(coordinates)


def _checksums(tensors: list[Tensor]) -> list[str]:
    """A checksum of the bits of each tensor's local part, read from each device together."""
    weights: dict[torch.device, Tensor] = {}
    found: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for index, tensor in enumerate(map(local, tensors)):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            continue  # a subclass may have other memory than it shows
        device = tensor.device
        if device not in weights:
            steps = torch.arange(_BLOCK, device=device)
            weights[device] = (steps * _FACTOR + _OFFSET) | 1
        checksum = _checksum(tensor.detach(), weights[device])
        found.setdefault(device, []).append((index, checksum))
    result = [""] * len(tensors)
    for pairs in found.values():
        numbers = torch.stack([checksum for _, checksum in pairs]).tolist()
        for (index, _), number in zip(pairs, numbers, strict=True):
            result[index] = f"{number % 2**64:016x}"
    return result


def _checksum(tensor: Tensor, weights: Tensor) -> Tensor:
    """The sum of all entries, their bits read as integers, with a weight for each place, `[]`."""
    checksum = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if tensor.layout is not torch.strided:
        return checksum
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    bits = tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    for block in bits.split(_BLOCK):  # integers wrap around
        checksum = checksum * _FACTOR + (block * weights[: len(block)]).sum()
    return checksum


def _listed(ranks: list[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {', '.join(map(str, sorted(set(ranks))))}"
