"""Embeddings, bags of embeddings, and rows read by an index, sparse gradients or not.

Index legend: `n` sample, `s` position, `v` row of the table.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc.fisher.gradients import Rows
from ewc.fisher.rules.linear import positions
from ewc.fisher.rules.registry import NotCovered, Operation, decomposition, rule


@rule(torch.embedding)
def embedding(
    op: Operation,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a table: `grad W[n, v] = sum of g[n, s] over the positions s with index[n, s] = v`.

    The row `padding_idx` gets none. `F.embedding` calls this function, with -1 for no padding.
    """
    if scale_grad_by_freq:
        raise NotCovered
    index, value = op.samples(indices), op.value(weight)
    flat = index.flatten(1).long()

    def weight_gradient(g: Tensor) -> Rows:
        g = positions(g)
        if padding_idx >= 0:
            g = g.masked_fill((flat == padding_idx).unsqueeze(2), 0)
        return Rows(flat, g, len(value))

    return op.record(F.embedding(index, value), {weight: weight_gradient})


@decomposition(torch.index_select, torch.Tensor.index_select)
def index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    """An embedding, whose rows are what lies behind each place along `dim`."""
    if input.dim() == 0 or index.dim() != 1:
        raise NotCovered
    places = input.movedim(dim, 0) if dim else input
    rows = places if places.dim() == 2 else places.reshape(len(places), -1)
    read = torch.embedding(rows, index)
    return read.reshape(len(read), *places.shape[1:]).movedim(0, dim)


@decomposition(torch.Tensor.__getitem__)
def getitem(input: Tensor, index: Any) -> Tensor:
    """`W[index]`, `W[:, index]`, `W[rows, columns]`: integer tensors next to each other."""
    index = index if isinstance(index, tuple) else (index,)
    before = next((n for n, each in enumerate(index) if each != slice(None)), 0)
    indices = index[before:]
    if not indices or not all(isinstance(each, Tensor) for each in indices):
        raise NotCovered
    if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
        raise NotCovered
    sizes = input.shape[before : before + len(indices)]
    numbers = torch.arange(math.prod(sizes), device=input.device).view(sizes)[indices]
    rows = input.flatten(before, before + len(indices) - 1)
    read = rows.index_select(before, numbers.flatten())
    return torch.unflatten(read, before, numbers.shape) if numbers.dim() else read.squeeze(before)


@decomposition(F.embedding_bag)
def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """A bag `[B, L] -> [B, D]` is an embedding followed by a sum, mean or maximum over L."""
    if offsets is not None or input.dim() != 2:
        raise NotCovered
    rows = F.embedding(
        input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq=scale_grad_by_freq
    )
    if padding_idx is None:
        kept = torch.ones_like(input, dtype=torch.bool).unsqueeze(2)
    else:
        kept = (input != padding_idx % weight.shape[0]).unsqueeze(2)
    if mode == "max":
        largest = rows.masked_fill(~kept, -torch.inf).amax(1)
        return torch.where(kept.any(1), largest, 0.0)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(2)
    bags = torch.where(kept, rows, 0.0).sum(1)
    return bags / kept.sum(1).clamp(min=1) if mode == "mean" else bags
