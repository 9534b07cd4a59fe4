"""Embeddings and bags of embeddings, sparse gradients or not."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc.fisher.gradients import Rows
from ewc.fisher.rules._registry import NotCovered, Operation, rewriting, rule
from ewc.fisher.rules.linear import positions


@rule(F.embedding)
def embedding(
    op: Operation,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`grad W[n, v] = sum of g[n, s] over the positions s that read row v, but for padding_idx`."""
    if scale_grad_by_freq or max_norm is not None:
        raise NotCovered
    index, value = op.samples(input), op.value(weight)
    rows = value.shape[0]
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else rows + padding_idx
    flat = index.reshape(index.shape[0], -1).long()

    def weight_gradient(g: Tensor) -> Rows:
        g = positions(g)
        if padding is not None:
            g = g.masked_fill((flat == padding).unsqueeze(2), 0)
        return Rows(flat, g, rows)

    return op.watch(F.embedding(index, value), {weight: weight_gradient})


@rewriting(F.embedding_bag)
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
    total = torch.where(kept, rows, 0.0).sum(1)
    return total / kept.sum(1).clamp(min=1) if mode == "mean" else total
