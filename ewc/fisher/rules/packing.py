"""Sequences packed in the forward pass: `pack_padded_sequence` and `pad_packed_sequence`.

PyTorch reads the lengths, so that the samples of a batch are grouped by them. The steps of a packed
sequence are those of all sequences at the first time, then at the second, and so on. A sample is a
batch of one sequence, or of several as those of a document; `B` is their number.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ewc.fisher.rules.registry import Operation, rule


@rule(torch._pack_padded_sequence, always=True)
def pack_padded_sequence(
    op: Operation, input: Tensor, lengths: Tensor, batch_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Input `[B, T, *]` or `[T, B, *]`; the steps `[S, *]`, and how many sequences have each."""
    x = op.samples(input)
    # Of one sample by PyTorch, which checks the lengths.
    _, sizes = torch._pack_padded_sequence(x[0].detach(), op.shared(lengths), batch_first)
    steps = x.transpose(1, 2) if batch_first else x  # [N, T, B, *]
    index = _index(sizes.tolist(), steps.shape[2], x.device)
    return steps.flatten(1, 2).index_select(1, index), sizes.expand(len(x), *sizes.shape)


@rule(torch._pad_packed_sequence, always=True)
def pad_packed_sequence(
    op: Operation,
    data: Tensor,
    batch_sizes: Tensor,
    batch_first: bool,
    padding_value: float,
    total_length: int,
) -> tuple[Tensor, Tensor]:
    """The inverse, for steps `[S, *]`."""
    x, sizes = op.samples(data), op.shared(batch_sizes)
    _, lengths = torch._pad_packed_sequence(x[0].detach(), sizes, batch_first, 0.0, total_length)
    batch = int(sizes[0])
    index = _index(sizes.tolist(), batch, x.device)
    padded = x.new_full((len(x), total_length * batch, *x.shape[2:]), padding_value)
    padded = padded.index_copy(1, index, x).unflatten(1, (total_length, batch))
    return (
        padded.transpose(1, 2) if batch_first else padded,
        lengths.expand(len(x), *lengths.shape),
    )


def _index(sizes: Sequence[int], batch: int, device: torch.device) -> Tensor:
    """Where each step of a packed sequence lies among all times and sequences, `[S]`."""
    places = [time * batch + n for time, size in enumerate(sizes) for n in range(size)]
    return torch.tensor(places, dtype=torch.long, device=device)
