"""Calls that `vmap` refuses, once for each sample.

`vmap` has no way to run an `autograd.Function` of the old style, or an operation that reads values
or makes an output whose size depends on values (`x[mask]`). Such a call alone is run once for each
sample, recorded by autograd, and the outputs are stacked.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ewc import _vmap
from ewc.fisher.paths.branches import DivergentBranches
from ewc.fisher.paths.memory import address


def run_per_sample(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    samples: int,
    level: int,
) -> tuple[Any, list[Tensor]]:
    """Call a function once for each sample, and stack the outputs.

    Args:
        func: The function.
        args: Its arguments, as the model sees them.
        kwargs: Its keyword arguments.
        samples: N.
        level: The nesting level of the `vmap`.

    Returns:
        The outputs, as the model sees them. An output that is an argument, as that of a write in
        place, stays this argument. Also the physical tensors, if any, that share no memory now but
        would in a run on one sample: outputs that are views of arguments, and these arguments.

    Raises:
        DivergentBranches: Shapes, or values that are not tensors, differ between the samples.
        RuntimeError: The function writes to an argument that the samples share.
    """
    tensors = [each for each in tree_leaves((args, dict(kwargs))) if isinstance(each, Tensor)]
    physical = {id(each): _vmap.physical(each, level) for each in tensors}
    shared = [each for each in tensors if physical[id(each)] is None]
    versions = [each._version for each in shared]
    rows = []
    with _vmap.beneath():
        for sample in range(samples):
            rows.append(_Row(func, args, kwargs, physical, sample))
        if [each._version for each in shared] != versions:
            raise RuntimeError("a call writes to memory that all samples share")
        _refuse_divergent(func, [row.traits for row in rows])
        outputs: list[Any] = []
        separated: list[Tensor] = []
        for place, leaf in enumerate(rows[0].leaves):
            own = rows[0].same[place]
            if own is not None or not isinstance(leaf, Tensor):
                outputs.append(leaf if own is None else own)
                continue
            stacked = torch.stack([row.leaves[place] for row in rows])
            outputs.append(_vmap.logical(stacked, level))
            sources = [row.sources[place] for row in rows]
            found = [source for source in sources if source is not None]
            separated += [*found[:1], *([stacked] if found else [])]
    return tree_unflatten(outputs, rows[0].spec), separated


class _Row:
    """The call for one sample.

    Args:
        func: The function.
        args: Its arguments, as the model sees them.
        kwargs: Its keyword arguments.
        physical: By the id of each tensor among these all of its samples; None if it has none.
        sample: Which sample.

    Attributes:
        leaves: The outputs.
        spec: Their structure.
        same: For each output the argument that it is, or None.
        sources: For each the physical tensor in whose memory it lies, or None.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        physical: Mapping[int, Tensor | None],
        sample: int,
    ) -> None:
        given: dict[int, tuple[Tensor, Tensor]] = {}  # what is passed, with the argument itself
        places: dict[int, Tensor] = {}

        def pick(tensor: Tensor) -> Tensor:
            whole = physical[id(tensor)]
            if whole is None:
                return tensor
            passed = whole[sample]
            given[id(passed)] = passed, tensor
            places[address(passed)] = whole
            return passed

        own_args, own_kwargs = tree_map_only(Tensor, pick, (args, dict(kwargs)))
        self.leaves, self.spec = tree_flatten(func(*own_args, **own_kwargs))
        self.same = [given[id(leaf)][1] if id(leaf) in given else None for leaf in self.leaves]
        self.sources = [
            places.get(address(leaf)) if isinstance(leaf, Tensor) and leaf.numel() else None
            for leaf in self.leaves
        ]

    @property
    def traits(self) -> list[Any]:
        """What all samples must have in common."""
        kinds = [
            (each.shape, each.dtype) if isinstance(each, Tensor) else each for each in self.leaves
        ]
        return [self.spec, *kinds, *map(id, self.same)]


def _refuse_divergent(func: Callable[..., Any], traits: list[list[Any]]) -> None:
    groups: list[tuple[list[Any], list[int]]] = []
    for sample, own in enumerate(traits):
        members = next((members for known, members in groups if known == own), None)
        if members is None:
            groups.append((own, [sample]))
        else:
            members.append(sample)
    if len(groups) > 1:
        name = getattr(func, "__qualname__", None) or getattr(func, "__name__", "a function")
        raise DivergentBranches(
            [members for _, members in groups],
            f"{name} gives outputs whose shapes differ between samples",
        )
