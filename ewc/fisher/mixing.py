"""Finds a module that mixes the samples of a batch.

The Fisher information is a mean over independent samples. A module whose output for one sample
depends on the others in its batch, in eval mode too, has no per-sample gradients: that is an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ewc.data.batch import Batch
from ewc.fisher.numerics import full_precision, is_half_precision
from ewc.fisher.paths.branches import READS

_OTHER_OUTPUT = "the output for a sample depends on its batch"

Record = list[tuple[str, list[Tensor], list[Tensor]]]


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuse batch normalisation without running statistics.

    Raises:
        ValueError: There is one; the message names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(_message(name, module, "it has no running statistics"))


class Runs:
    """Runs a model, and keeps its outputs.

    Args:
        outputs: `outputs(raw, samples) -> (outputs, rest)`: runs the model.

    Attributes:
        found: The tensors in the outputs of each run.
        read: Whether the model has read values out of tensors, to branch on them.
    """

    def __init__(self, outputs: Callable[[Any, int], tuple[Any, tuple[Any, ...]]]) -> None:
        self.found: list[list[Tensor]] = []
        self.read = False
        self._outputs = outputs

    def __call__(self, raw: Any, samples: int = 1) -> tuple[Any, tuple[Any, ...]]:
        """Run the model once more, on so many samples."""
        with _ReadsMode() as reads:
            outputs, rest = self._outputs(raw, samples)
        self.found.append(_tensors(outputs))
        self.read = self.read or reads.seen
        return outputs, rest


def refuse_mixing(model: nn.Module, runs: Runs, batch: Batch, restore: Callable[[], None]) -> None:
    """Refuse a model whose output for a sample in a batch of two differs from that alone.

    Args:
        model: The model, in eval mode.
        runs: Three runs: on both samples as one batch, on the first, and on the second.
        batch: The two samples.
        restore: Called after each run, so that the next one starts from the same state.

    Raises:
        ValueError: They differ; the message names the first module whose outputs differ.
    """
    parts = (batch, batch.take(0, 1), batch.take(1, 2))
    # Rounding depends on the size of a batch, and adds up over layers. A norm over the batch makes
    # a difference as large as the outputs themselves.
    tolerance = 0.2 if is_half_precision(model) else 1e-3

    def run(part: Batch) -> list[Tensor]:
        try:
            with full_precision():
                runs(part.raw, part.size)
            return runs.found[-1]
        finally:
            restore()

    both, first, second = runs.found
    if _agree(both, first, second, tolerance):
        return
    if runs.read or not _equal(first, run(parts[1])):
        return  # a branch that depends on values, or random numbers: no module that mixes
    records = []
    for part in parts:
        record: Record = []
        hooks = [
            module.register_forward_hook(_recorder(name, record))
            for name, module in model.named_modules()
        ]
        try:
            run(part)
        finally:
            for hook in hooks:
                hook.remove()
        records.append(record)
    for (name, into, out), (_, into1, out1), (_, into2, out2) in zip(*records, strict=False):
        if _agree(into, into1, into2, tolerance) and not _agree(out, out1, out2, tolerance):
            raise ValueError(_message(name, model.get_submodule(name), _OTHER_OUTPUT))
    raise ValueError(_message("", model, _OTHER_OUTPUT))


class _ReadsMode(TorchFunctionMode):
    """Records whether a model reads values out of tensors, to branch on them."""

    seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen = self.seen or func in READS
        return func(*args, **(kwargs or {}))


def _recorder(name: str, record: Record) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        record.append((name, _tensors(args), _tensors(output)))

    return hook


def _tensors(tree: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [leaf.detach().clone() for leaf in leaves if leaf.is_floating_point()]


def _agree(both: list[Tensor], first: list[Tensor], second: list[Tensor], tolerance: float) -> bool:
    """Whether the outputs of a batch of two samples equal those of each sample alone.

    The batch dimension has twice the size. Outputs of other shapes, perhaps padded to the longest
    sample of the batch, cannot be compared and pass.
    """
    for pair, one, two in zip(both, first, second, strict=False):
        if one.shape != two.shape or pair.dim() != one.dim():
            continue
        sizes = list(zip(pair.shape, one.shape, strict=True))
        differing = [dim for dim, (twice, once) in enumerate(sizes) if twice != once]
        if len(differing) != 1 or pair.shape[differing[0]] != 2 * one.shape[differing[0]]:
            continue
        if not _close(pair, torch.cat([one, two], differing[0]), tolerance):
            return False
    return True


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(
        one.shape == other.shape and torch.equal(one, other)
        for one, other in zip(some, others, strict=False)
    )


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    one, other = one.to(torch.float64), other.to(torch.float64)
    scale = other[other.isfinite()].abs().max().item() if bool(other.isfinite().any()) else 0.0
    return torch.allclose(one, other, rtol=0, atol=tolerance * scale + 1e-12, equal_nan=True)


def _message(name: str, module: nn.Module, found: str) -> str:
    subject = f"module {name!r}" if name else "the model"
    return (
        f"A model must treat the samples of a batch independently in eval mode; {subject} "
        f"({type(module).__name__}) mixes them: {found}. Fix: use running statistics "
        "(track_running_stats=True), or a norm over each sample (GroupNorm, LayerNorm)."
    )
