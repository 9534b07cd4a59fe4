"""An entry of the zoo: a model, data, and the method that each of its parameters must take."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ewc import EWC, Summary
from tests import oracle
from tests.integrations.zoo.data import SAMPLES
from tests.integrations.zoo.task import Task
from tests.support.asserts import assert_close


@dataclass(frozen=True)
class Entry:
    """A model with data, and what is expected of it.

    Attributes:
        library: What must be installed.
        model: Makes it, tiny and with random weights.
        data: Makes the batch of all samples.
        task: What its outputs mean.
        forward: As in `EWC`.
        slow: Beginnings of names of parameters, with the method that they take if it is not
            `"rule"`; `""` is every parameter.
        reason: Why it is not `"rule"`.
        rows: Whether the oracle differentiates the rows of a batch's outputs, because PyTorch is
            wrong for one sample or the model cannot be differentiated twice.
        dtype: Of parameters and data. In bfloat16, the oracle is in float64 all the same.
        tolerance: What the Fisher may be off, as a share of each parameter's largest entry: more
            than the default where a model computes in a narrower type by itself.
    """

    library: str
    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    task: Task
    forward: Callable[[nn.Module, Any], Any] | None = None
    slow: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    rows: bool = False
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-8

    def method(self, name: str) -> str:
        """The method that a parameter must take."""
        found = [method for prefix, method in self.slow.items() if name.startswith(prefix)]
        return found[-1] if found else "rule"

    def changed(self, change: Callable[[nn.Module], nn.Module | None], **fields: Any) -> "Entry":
        """The same with a model that is changed, or wrapped, after it is made."""

        def make() -> nn.Module:
            model = self.model()
            return change(model) or model

        return replace(self, model=make, **fields)


def build(entry: Entry) -> nn.Module:
    """In train mode; no weight, bias, scale or running statistic is 0, 1, or next to 0."""
    torch.manual_seed(0)
    model = entry.model().to(entry.dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.abs().max() < 0.01:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(2)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def compare(entry: Entry) -> Counter[str]:
    """The Fisher equals the oracle's, every parameter goes by its method.

    Returns:
        How many parameters go by which method.
    """
    model = build(entry)
    right = expected(entry, model)
    ewc, summary = consolidate(entry, model)
    assert_close(ewc.fisher, right, entry.tolerance)
    paths = dict(summary.paths)
    methods = {n: entry.method(n) if each.any() else paths[n] for n, each in right.items()}
    assert paths == methods, set(summary.reasons.values())
    return Counter(paths.values())


def consolidate(entry: Entry, model: nn.Module) -> tuple[EWC, Summary]:
    ewc = EWC(model, entry.task.likelihood, forward=entry.forward)
    return ewc, ewc.consolidate(batches(entry))


def batches(entry: Entry) -> Iterator[Any]:
    """From a generator, so that they are run one by one; the last is a single sample."""
    data = cast(entry.data(), entry.dtype)
    for part in (slice(0, SAMPLES - 1), slice(SAMPLES - 1, SAMPLES)):
        yield tree_map_only(Tensor, lambda each, part=part: each[part], data)


def expected(entry: Entry, model: nn.Module) -> dict[str, Tensor]:
    """The Fisher by the oracle."""
    dtype = torch.promote_types(entry.dtype, torch.float32)
    wide = torch.float64 if entry.dtype.itemsize == 2 else dtype
    model, data = copy.deepcopy(model).to(wide), cast(entry.data(), wide)
    if entry.rows:

        def losses(model: nn.Module, _: int) -> Tensor:
            outputs, targets = run(entry, model, data)
            pairs = zip(outputs.split(1), targets.split(1), strict=True)
            return torch.stack([entry.task.nll(*pair) for pair in pairs])

    else:

        def losses(model: nn.Module, n: int) -> Tensor:
            return entry.task.nll(*run(entry, model, oracle.one(data, n))).reshape(1)

    sums = oracle.squares(model, losses, 1 if entry.rows else SAMPLES)
    return {name: each / SAMPLES for name, each in sums.items()}


def run(entry: Entry, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Outputs and targets, without the library."""
    if isinstance(batch, dict):
        inputs, targets = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    else:
        inputs, targets = batch
    if entry.forward is not None:
        outputs = entry.forward(model, batch)
    elif isinstance(inputs, dict):
        outputs = model(**inputs)
    else:
        outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return getattr(outputs, "logits", outputs), targets


def cast(data: Any, dtype: torch.dtype) -> Any:
    """The data with its floating-point tensors in this type."""
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, data)
