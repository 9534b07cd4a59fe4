"""Finds a module that mixes the samples of a batch.

The Fisher information is a mean over independent samples. A module whose output for one sample
depends on the others in its batch, in eval mode too, has no per-sample gradients: that is an error.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ewc._autocast import without_autocast
from ewc._refusals import unless_refused
from ewc.data.batch import Batch
from ewc.data.structures import children, rebuild
from ewc.fisher.numerics import is_half_precision
from ewc.fisher.paths.branches import READS
from ewc.fisher.runner import Runner
from ewc.processes.layout import has_sharded_parameters

_OTHER_OUTPUT = "the output for a sample depends on its batch"
_UNCLEAR = f"{_OTHER_OUTPUT}, unless the model amplifies rounding, and it did not run in float64"

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_NARROW_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuse batch normalisation without running statistics.

    Raises:
        ValueError: There is one; the message names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(_message(_subject(name, module), "it has no running statistics"))


class Runs:
    """Runs a model, and keeps its outputs.

    Args:
        outputs: `outputs(raw, samples) -> (outputs, rest)`: runs the model.

    Attributes:
        outputs: The outputs of each run.
        found: The tensors in them, copied.
        read: Whether the model has read values out of tensors, to branch on them.
    """

    def __init__(self, outputs: Callable[[Any, int], tuple[Any, tuple[Any, ...]]]) -> None:
        self.outputs: list[Any] = []
        self.found: list[list[Tensor]] = []
        self.read = False
        self._outputs = outputs

    def __call__(self, raw: Any, samples: int = 1) -> tuple[Any, tuple[Any, ...]]:
        """Run the model once more, on this number of samples."""
        with _ReadsMode() as reads:
            outputs, rest = self._outputs(raw, samples)
        self.outputs.append(outputs)
        self.found.append(_tensors(outputs))
        self.read = self.read or reads.seen
        return outputs, rest


def refuse_mixing(runner: Runner, runs: Runs, batch: Batch) -> None:
    """Refuse a model whose output for a sample depends on its batch.

    The outputs for a sample alone and in a batch of two may differ by rounding, which a model can
    amplify to any size. So where they differ, the batch `(a, b)` is compared with `(a, a)` and
    `(b, b)`: operations on equal shapes round equally, and draw the same random numbers, so that
    only mixing changes the output for `a`, or for `b`. If nothing changes, the output may still
    depend on the size of the batch. It does so in float64 too, where rounding does not matter.

    Args:
        runner: Runs the model.
        runs: Three runs: on both samples as one batch, on the first, and on the second.
        batch: The two samples.

    Raises:
        ValueError: They differ; the message names the first module whose outputs differ.
    """
    # Rounding depends on the size of a batch, and adds up over layers. A norm over the batch makes
    # a difference as large as the outputs themselves.
    tolerance = 0.2 if is_half_precision(runner.model) else 1e-3

    def agree(both: Any, first: Any, second: Any) -> bool:
        return _agree(both, first, second, tolerance=tolerance)

    if agree(*runs.found) or runs.read:
        return  # a branch that depends on values is no module that mixes
    both, first, second = [
        _record(runner, runs, part) for part in (batch, batch.take(0, 1), batch.take(1, 2))
    ]
    again, twice_first, twice_second = [
        _record(runner, runs, part) for part in (batch, batch.pick([0, 0]), batch.pick([1, 1]))
    ]
    ends = [each.position for each in (again, twice_first, twice_second)]
    if not (_equal(both.outputs, again.outputs) and all(_equal(both.position, e) for e in ends)):
        return  # random numbers that are not repeated, or not as many for other samples
    for row, (twice, alone) in enumerate(((twice_first, first), (twice_second, second))):
        rows_agree = partial(_rows_agree, row=row, tolerance=tolerance)
        if not rows_agree(both.outputs, twice.outputs, alone.outputs):
            _refuse(runner, _first_mixing_module((both, twice, alone), rows_agree))
    draws = not _equal(both.position, runner.randomness.position)
    is_rounding = None if draws else _agree_in_float64(runner, batch)
    if not draws and not is_rounding:
        _refuse(
            runner, _first_mixing_module((both, first, second), agree), is_sure=is_rounding is False
        )


@dataclass(frozen=True)
class _Record:
    """One run.

    Attributes:
        outputs: The tensors in the outputs of the model.
        modules: What names each module that ran, and the tensors in its inputs and outputs.
        position: Where the random stream stood at its end.
    """

    outputs: list[Tensor]
    modules: list[tuple[str, list[Tensor], list[Tensor]]]
    position: list[Tensor]


def _record(runner: Runner, runs: Runs, part: Batch) -> _Record:
    """Run the model from where the random stream stands, and set the stream back."""
    modules: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def recorder(subject: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, args, output: modules.append((subject, _tensors(args), _tensors(output)))

    hooks = [
        module.register_forward_hook(recorder(subject)) for subject, module in _subjects(runner)
    ]
    try:
        _, position = runner.repeatably(lambda: runs(part.raw, part.size))
    finally:
        for hook in hooks:
            hook.remove()
    return _Record(runs.found[-1], modules, position)


def _subjects(runner: Runner) -> Iterator[tuple[str, nn.Module]]:
    """All modules that a run may use, and how a message names each."""
    for name, module in runner.model.named_modules():
        yield _subject(name, module), module
    for outer in runner.others:
        for name, module in outer.named_modules():
            kind = f"{type(module).__name__}, {name!r}" if name else type(module).__name__
            yield f"a module outside the model ({kind})", module


def _subject(name: str, module: nn.Module) -> str:
    return f"{f'module {name!r}' if name else 'the model'} ({type(module).__name__})"


def _first_mixing_module(records: Sequence[_Record], agree: Callable[..., bool]) -> str | None:
    """What names the first module whose inputs agree, and its outputs do not."""
    for runs in zip(*(record.modules for record in records), strict=False):
        subjects, inputs, outputs = zip(*runs, strict=True)
        if agree(*inputs) and not agree(*outputs):
            return str(subjects[0])
    return None


def _agree_in_float64(runner: Runner, batch: Batch) -> bool | None:
    """Whether, in float64, the outputs do not depend on the batch; None if it does not run."""
    if has_sharded_parameters(runner.model) or runner.hooked:
        return None

    def run() -> bool:
        found = []
        wide = replace(runner, model=copy.deepcopy(runner.model).double())
        for part in (batch, batch.take(0, 1), batch.take(1, 2)):
            with runner.randomness.stream(), without_autocast({runner.device.type}), _WideMode():
                outputs, _ = wide.outputs(_in_float64(part.raw), part.size)
            found.append(_tensors(outputs))
        both, first, second = found
        return _agree(both, first, second, tolerance=1e-3)

    try:
        return unless_refused(run)
    finally:
        runner.restore()


def _in_float64(raw: Any) -> Any:
    """A raw batch, with float64 in place of narrower floating-point numbers."""
    if isinstance(raw, Tensor):
        return raw.double() if raw.is_floating_point() else raw
    items = children(raw)
    return raw if items is None else rebuild(raw, [_in_float64(item) for item in items])


class _ReadsMode(TorchFunctionMode):
    """Records whether a model reads values out of tensors, to branch on them."""

    seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen = self.seen or func in READS
        return func(*args, **(kwargs or {}))


class _WideMode(TorchFunctionMode):
    """Casts to float64 where a model casts to a narrower floating-point dtype."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _NARROW_CASTS:
            return args[0].double()
        args = [torch.float64 if _is_narrow(each) else each for each in args]
        given = kwargs or {}
        return func(*args, **{k: torch.float64 if _is_narrow(v) else v for k, v in given.items()})


def _is_narrow(argument: Any) -> bool:
    return isinstance(argument, torch.dtype) and argument in _NARROW


def _tensors(tree: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [leaf.detach().clone() for leaf in leaves if leaf.is_floating_point()]


def _agree(both: list[Tensor], first: list[Tensor], second: list[Tensor], tolerance: float) -> bool:
    """Whether the outputs of a batch of two samples equal those of each sample alone."""
    for pair, one, two in zip(both, first, second, strict=False):
        dim = samples_dim(pair, one)
        if dim is None or one.shape != two.shape:
            continue
        if not _close(pair, torch.cat([one, two], dim), tolerance):
            return False
    return True


def _rows_agree(
    both: list[Tensor], twice: list[Tensor], alone: list[Tensor], row: int, tolerance: float
) -> bool:
    """Whether two batches of two samples have the same outputs for the sample that they share.

    Args:
        both: The outputs for one batch.
        twice: Those for the other.
        alone: Those for the sample alone, whose shapes say which dimension the samples are in.
        row: The index of the sample.
        tolerance: The difference that is allowed, as a share of the largest output.
    """
    for pair, other, one in zip(both, twice, alone, strict=False):
        dim = samples_dim(pair, one)
        if dim is None or pair.shape != other.shape:
            continue
        start, length = row * one.shape[dim], one.shape[dim]
        if not _close(pair.narrow(dim, start, length), other.narrow(dim, start, length), tolerance):
            return False
    return True


def samples_dim(both: Tensor, one: Tensor) -> int | None:
    """The dimension that has twice the size in a batch of two as for one sample.

    Outputs of other shapes, perhaps padded to the longest sample of the batch, cannot be compared:
    None.
    """
    if both.dim() != one.dim():
        return None
    differing = [dim for dim in range(one.dim()) if both.shape[dim] != one.shape[dim]]
    is_double = len(differing) == 1 and both.shape[differing[0]] == 2 * one.shape[differing[0]]
    return differing[0] if is_double else None


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(
        one.shape == other.shape and torch.equal(one, other)
        for one, other in zip(some, others, strict=False)
    )


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    one, other = one.to(torch.float64), other.to(torch.float64)
    scale = other[other.isfinite()].abs().max().item() if bool(other.isfinite().any()) else 0.0
    return torch.allclose(one, other, rtol=0, atol=tolerance * scale + 1e-12, equal_nan=True)


def _refuse(runner: Runner, subject: str | None, *, is_sure: bool = True) -> NoReturn:
    subject = subject or _subject("", runner.model)
    raise ValueError(
        _message(subject, _OTHER_OUTPUT)
        if is_sure
        else _message(subject, _UNCLEAR, verb="seems to mix")
    )


def _message(subject: str, found: str, verb: str = "mixes") -> str:
    return (
        f"A model must treat the samples of a batch independently in eval mode; {subject} "
        f"{verb} them: {found}. Fix: compute each output from its own sample; in place of a norm "
        "over the batch, use running statistics (track_running_stats=True) or a norm over each "
        "sample (GroupNorm, LayerNorm)."
    )
