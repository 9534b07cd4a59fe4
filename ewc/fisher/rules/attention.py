"""Attention: `scaled_dot_product_attention`, which has no parameters of its own.

Under `vmap` PyTorch runs it one sample at a time; here the samples join the batch dimension.
(`F.multi_head_attention_forward` needs no rule: its linear maps are seen one by one.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from ewc.fisher.rules.registry import NotCovered, Operation, rule


@rule(torch._nested_tensor_from_mask_left_aligned, always=True)
def nested_tensor_from_mask_left_aligned(op: Operation, input: Tensor, mask: Tensor) -> bool:
    """Asked by `nn.TransformerEncoder` before it packs; no stands for the same, not packed."""
    return False


@rule(F.scaled_dot_product_attention, always=True)
def scaled_dot_product_attention(
    op: Operation,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **options: Any,
) -> Tensor:
    """Query `[..., H, L, E]`: everything before the heads is folded into one dimension."""
    if isinstance(attn_mask, CausalBias):
        attn_mask = attn_mask._materialize(query.device)
    q, k, v = op.samples(query), op.samples(key), op.samples(value)
    lead = q.shape[: max(1, q.dim() - 3)]
    if k.shape[: len(lead)] != lead or v.shape[: len(lead)] != lead:
        raise NotCovered
    mask = None
    if attn_mask is not None:
        mask = op.samples(attn_mask)
        while mask.dim() < q.dim():
            mask = mask.unsqueeze(1)
        mask = mask.expand(*lead, *mask.shape[len(lead) :]).flatten(0, len(lead) - 1)
    q, k, v = (each.flatten(0, len(lead) - 1) for each in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, *args, **options)
    return torch.unflatten(out, 0, lead)
