"""What is judged about the Fisher information of one task before it is learned."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ewc._checks import positive_int
from ewc.fisher import Squares
from ewc.processes.layout import local
from ewc.processes.ranks import Ranks


def samples_in(batches: Any, squares: Squares, dataset_size: int | None, ranks: Ranks) -> int:
    """How many samples the data of a task hold, which a pass may not have seen all.

    Raises:
        ValueError: Nothing says how many.
    """
    if dataset_size is not None:
        return dataset_size
    if not squares.truncated:
        return squares.samples
    try:
        size = positive_int("len(batches.dataset)", len(batches.dataset))
    except (AttributeError, TypeError):
        raise ValueError(
            'reduction="sum" must know the number of samples; max_samples has cut the pass '
            "short and batches.dataset has no length. Pass dataset_size."
        ) from None
    ranks.agree({"len(batches.dataset); pass dataset_size": size})
    return size


def silent_in(fisher: Mapping[str, Tensor], ranks: Ranks) -> list[str]:
    """The names of those whose Fisher is zero in every entry, on every process.

    Raises:
        ValueError: They all are.
    """
    device = next(iter(fisher.values())).device
    loud = torch.stack([local(one).any().to(device) for one in fisher.values()])
    ranks.barrier("what is zero")
    heard = ranks.maximum(loud.to(torch.uint8)).tolist()
    silent = [name for name, one in zip(fisher, heard, strict=True) if not one]
    if len(silent) == len(fisher):
        raise ValueError(
            "The Fisher of every parameter is zero; nothing would be protected. The "
            "negative log-likelihood must depend on the parameters: are the outputs "
            "detached, all positions masked or ignored, or other parameters used?"
        )
    return silent


def silent_message(name: str, squares: Squares) -> str:
    """What is zero, and whether a gradient arrived at all."""
    why = (
        "no gradient reached it (is it used, and not detached?)"
        if squares.paths[name] == "unused"
        else "every gradient that reached it is zero"
    )
    return f"The Fisher of {name!r} is zero in every entry: {why}. This task does not protect it."


def slow_message(squares: Squares) -> str:
    """What went one sample at a time, and why."""
    names: dict[str, list[str]] = {}
    for name, reason in squares.reasons.items():
        names.setdefault(reason, []).append(repr(name))
    found = "; ".join(f"{', '.join(some)}, because {reason}" for reason, some in names.items())
    return (
        "The samples of this task were run one at a time, which gives the same Fisher and takes "
        f"longer, for {found}. If that is too slow: a forward that torch.func.vmap can do, or a "
        "rule of your own (ewc.fisher.rule)."
    )
