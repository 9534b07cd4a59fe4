"""What a collection has verified, kept for the next collection of the same object.

To verify the methods takes several runs on two samples. The next collection need not repeat it
unless something has changed that it rests on.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from ewc._options import FisherType, Method
from ewc.data.batch import Batch
from ewc.fisher.paths.vectorised import Needs, Vectorised
from ewc.fisher.rules.registry import ALWAYS, DECOMPOSITIONS, RULES
from ewc.model.reachable import Identity, Reachable, describe_tensor


@dataclass(frozen=True)
class Verified:
    """A verification of one model and likelihood: what it rests on, and what it has shown.

    Not among it are the values of parameters and buffers: training changes them.

    Attributes:
        basis: The code, the modules and the settings; see `basis`.
        batch: A batch of no samples; those that were verified had its structure and its shapes.
        calls: The functions of PyTorch that are called in a run, in order; those of the model alone
            if targets are drawn, because other terms are verified then.
        methods: `"rule"` or `"vmap"`, by the name of each parameter that was used.
        needs: The memory of a run.
    """

    basis: list[Hashable]
    batch: Batch
    calls: list[Callable[..., Any]]
    methods: dict[str, Method]
    needs: Needs

    @classmethod
    def of(
        cls, basis: list[Hashable], batch: Batch, vectorised: Vectorised, fisher_type: FisherType
    ) -> "Verified":
        """What was verified on a batch."""
        kind = batch.take(0, 0).copied()
        calls = _calls(vectorised, fisher_type)
        return cls(basis, kind, calls, dict(vectorised.methods), vectorised.needs)

    def is_shown_by(self, vectorised: Vectorised, fisher_type: FisherType) -> bool:
        """Whether the last run of some methods was like those that were verified.

        If targets are drawn, other terms than those that count were verified. They may use other
        parameters, and only the model's own part of the run is compared.
        """
        if vectorised.fallback or _calls(vectorised, fisher_type) != self.calls:
            return False
        if fisher_type == "mc":
            shared = vectorised.methods.keys() & self.methods.keys()
            same = all(vectorised.methods[name] == self.methods[name] for name in shared)
            return same and not vectorised.model_reads
        return vectorised.methods == self.methods and not vectorised.reads


def _calls(vectorised: Vectorised, fisher_type: FisherType) -> list[Callable[..., Any]]:
    of_terms = [] if fisher_type == "mc" else vectorised.calls_of_terms
    return [*vectorised.calls_of_model, *of_terms]


class LastVerification:
    """Remembers what the last collection of an object has verified; a copy remembers nothing.

    Attributes:
        verified: What it was; None if it must not be used again.
    """

    def __init__(self) -> None:
        self.verified: Verified | None = None

    def on(self, basis: list[Hashable], batch: Batch) -> Verified | None:
        """What was verified, if it rests on the same basis and the same kind of batch."""
        known = self.verified
        if known is None or known.basis != basis or not known.batch.joins(batch):
            return None
        return known

    def __reduce__(self) -> Any:
        return LastVerification, ()


def basis(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    reachable: Reachable,
    fisher_type: FisherType,
) -> list[Hashable]:
    """What a verification rests on, apart from the batch and from the calls of the model.

    Two lists are equal if nothing of this has changed:

    - the modules, their hooks, and the shapes and dtypes of their parameters and buffers, and which
      of them are one tensor;
    - the code of functions, what they close over, and attributes, as far as `reachable` goes;
    - the names of the parameters, the Fisher type, autocast, the default dtype and function modes;
    - the rules.
    """
    modules = dict.fromkeys(
        module for outer in (model, *reachable.modules) for module in outer.modules()
    )
    numbers: dict[int, int] = {}

    def tensors(found: Iterable[tuple[str, Tensor | None]]) -> Iterator[Hashable]:
        for name, each in found:
            if each is None:
                yield name
            else:
                yield name, numbers.setdefault(id(each), len(numbers)), describe_tensor(each)

    described: list[Hashable] = [fisher_type, *parameters, torch.get_default_dtype()]
    described += map(type, _get_current_function_mode_stack())
    described += (each for table in (RULES, DECOMPOSITIONS) for each in table.items())
    described += ALWAYS
    for device in sorted({each.device.type for each in parameters.values()}):
        described += [torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)]
    for module in modules:
        described += [Identity(module), Identity(type(module)), *module._modules.keys()]
        described += tensors(module._parameters.items())
        described += tensors(module._buffers.items())
    described += map(Identity, hooks(modules))
    return [*described, *reachable.description]


def hooks(modules: Iterable[nn.Module]) -> list[Callable[..., Any]]:
    """The forward hooks of some modules, and those of all modules."""
    everywhere = nn.modules.module
    found = [
        everywhere._global_forward_pre_hooks,
        everywhere._global_forward_hooks,
        *(each for m in modules for each in (m._forward_pre_hooks, m._forward_hooks)),
    ]
    return [hook for each in found for hook in each.values()]
