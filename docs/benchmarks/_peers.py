"""Every way to sum squared per-sample gradients that collection is compared with.

Each peer is used as its documentation says, on a copy of the model, in the form that suits it.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from _models import Batch, losses, outputs, part, size
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ewc import EWC, Classification

Kind = TypeVar("Kind", bound="Contender")


class Contender(ABC):
    """One way to sum squared per-sample gradients.

    Args:
        model: The model, in eval mode; it may be changed.
    """

    title: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())

    @abstractmethod
    def run(self, batches: Sequence[Batch]) -> None:
        """One pass over the batches."""

    @abstractmethod
    def squares(self) -> dict[str, Tensor]:
        """What the last pass has found, summed over samples, by parameter."""


class Consolidation(Contender):
    """This library, through its front door: what a consolidation takes, all in all."""

    title = "**ewc**"

    def run(self, batches: Sequence[Batch]) -> None:
        """`EWC.consolidate`."""
        self._ewc = EWC(self.model, Classification())
        self._samples = self._ewc.consolidate(batches).samples

    def squares(self) -> dict[str, Tensor]:
        """The Fisher is a mean."""
        return {name: fisher * self._samples for name, fisher in self._ewc.fisher.items()}


class _Summing(Contender):
    """A contender that adds up batch by batch."""

    def run(self, batches: Sequence[Batch]) -> None:
        self._sums = {name: torch.zeros_like(each) for name, each in self.parameters.items()}
        for batch in batches:
            for name, squares in self.batch(batch).items():
                self._sums[name] += squares

    def squares(self) -> dict[str, Tensor]:
        return self._sums

    @abstractmethod
    def batch(self, batch: Batch) -> Mapping[str, Tensor]:
        """The sums of squares of one batch."""


class OneByOne(_Summing):
    """Plain autograd, one sample at a time: right by definition."""

    title = "one sample at a time"

    def batch(self, batch: Batch) -> Mapping[str, Tensor]:
        """A forward and a backward for each sample."""
        sums = {name: torch.zeros_like(each) for name, each in self.parameters.items()}
        for n in range(size(batch)):
            loss = losses(self.model, part(batch, n, n + 1)).sum()
            found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient)
        return sums


class VmapGrad(_Summing):
    """PyTorch's own `torch.func`, a few samples at a time.

    A chunk of all samples writes all their gradients out; smaller ones stay in cache.
    """

    title = "`vmap(grad)`"
    chunks = (None, 16, 4)
    chunk: int | None = None

    def tune(self, batches: Sequence[Batch]) -> None:
        """Choose the fastest chunk."""
        took = {}
        for chunk in self.chunks:
            self.chunk = chunk
            took[chunk] = seconds(self, batches)
        self.chunk = min(took, key=took.__getitem__)

    def batch(self, batch: Batch) -> Mapping[str, Tensor]:
        """Squares of the gradients of all samples, written out a chunk at a time."""
        held = {name: each.detach() for name, each in self.parameters.items()}
        whole = size(batch)
        step = self.chunk or whole
        sums: dict[str, Tensor] = {}
        for start in range(0, whole, step):
            of = part(batch, start, min(start + step, whole))
            gradients = torch.func.vmap(
                torch.func.grad(self._loss), in_dims=(None, 0), randomness="different"
            )(held, of)
            for name, gradient in gradients.items():
                squares = gradient.square().sum(0)  # some share memory
                sums[name] = sums[name] + squares if name in sums else squares
        return sums

    def _loss(self, parameters: dict[str, Tensor], sample: Batch) -> Tensor:
        batch = tree_map(lambda tensor: tensor.unsqueeze(0), sample)
        return losses(_Functional(self.model, parameters), batch).squeeze(0)


class _Functional(nn.Module):
    """The model with other parameters."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self._call = lambda *a, **k: torch.func.functional_call(model, parameters, a, k)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class BackPACK(_Summing):
    """BackPACK's `SumGradSquared`, which adds the squares up inside the backward pass."""

    title = "BackPACK `SumGradSquared`"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        from backpack import extend

        extend(model)

    def batch(self, batch: Batch) -> Mapping[str, Tensor]:
        """The sum of the losses, so that each sample's gradient is its own."""
        from backpack import backpack, extensions

        loss = losses(self.model, batch).sum()
        self.model.zero_grad()
        with backpack(extensions.SumGradSquared()):
            loss.backward()
        refuse_without_squares(self.model)
        return {name: each.sum_grad_squared for name, each in self.parameters.items()}


def refuse_without_squares(model: nn.Module) -> None:
    """BackPACK passes silently over modules that it has no rule for."""
    missing = {
        type(module).__name__
        for module in model.modules()
        for each in module.parameters(recurse=False)
        if not hasattr(each, "sum_grad_squared")
    }
    if missing:
        raise NotImplementedError(f"no SumGradSquared for {', '.join(sorted(missing))}")


class Opacus(_Summing):
    """Opacus' `GradSampleModule`, which writes every sample's gradient out."""

    title = "Opacus `GradSampleModule`"

    def __init__(self, model: nn.Module) -> None:
        from opacus import GradSampleModule
        from opacus.validators import ModuleValidator

        state = model.state_dict()
        fixed = ModuleValidator.fix(model.train())  # hooks work in training only
        # nn.LSTM has become DPLSTM, with weights of its own under two names each.
        fixed.load_state_dict(state, strict=False)
        super().__init__(fixed)
        self._wrapped = GradSampleModule(fixed, loss_reduction="sum", strict=False)

    def batch(self, batch: Batch) -> Mapping[str, Tensor]:
        """The gradients are `[N, *shape]`."""
        self._wrapped.zero_grad()
        losses(self._wrapped, batch).sum().backward()
        return {name: each.grad_sample.square().sum(0) for name, each in self.parameters.items()}


class _Laplace(Contender):
    """Laplace's diagonal approximation with one of its empirical-Fisher back ends."""

    backend: ClassVar[str]
    merges_positions: ClassVar[bool]

    def run(self, batches: Sequence[Batch]) -> None:
        import laplace
        from laplace import curvature

        last = outputs(self.model, part(batches[0], 0, 1)).dim() == 2
        model = _ForLaplace(self.model, classes_last=self.merges_positions and not last)
        self._fit = laplace.DiagLaplace(
            model, "classification", backend=getattr(curvature, self.backend)
        )
        try:
            self._fit.fit(_Loader(batches))
        except AttributeError:
            refuse_without_squares(self.model)
            raise

    def squares(self) -> dict[str, Tensor]:
        sizes = [each.numel() for each in self.parameters.values()]
        parts = self._fit.H.split(sizes)
        return {
            name: squares.view_as(each)
            for (name, each), squares in zip(self.parameters.items(), parts, strict=True)
        }


class _ForLaplace(nn.Module):
    """The model with the call and the order of outputs that Laplace's back ends expect."""

    def __init__(self, model: nn.Module, *, classes_last: bool) -> None:
        super().__init__()
        self.model = model
        self._classes_last = classes_last

    def forward(self, x: Any) -> Tensor:
        found = outputs(self.model, x if isinstance(x, Mapping) else (x, x))
        return found.transpose(1, 2).contiguous() if self._classes_last else found


class _Loader(list[Batch]):
    """Batches with the `dataset` that Laplace asks for the number of samples."""

    @property
    def dataset(self) -> range:
        return range(sum(map(size, self)))


class LaplaceBackPACK(_Laplace):
    """Laplace with BackPACK."""

    title = "Laplace, BackPACK back end"
    backend = "BackPackEF"
    merges_positions = True


class LaplaceASDL(_Laplace):
    """Laplace with ASDL."""

    title = "Laplace, ASDL back end"
    backend = "AsdlEF"
    merges_positions = True


class LaplaceCurvlinops(_Laplace):
    """Laplace with curvlinops."""

    title = "Laplace, curvlinops back end"
    backend = "CurvlinopsEF"
    merges_positions = False


CONTENDERS: list[type[Contender]] = [
    Consolidation,
    BackPACK,
    Opacus,
    LaplaceBackPACK,
    LaplaceASDL,
    LaplaceCurvlinops,
    VmapGrad,
    OneByOne,
]
OWN: list[type[Contender]] = [Consolidation, VmapGrad, OneByOne]
"""Those that need nothing but PyTorch."""
DISTRIBUTIONS = (
    "backpack-for-pytorch",
    "opacus",
    "laplace-torch",
    "asdfghjkl",
    "curvlinops-for-pytorch",
    "transformers",
)


def fresh(kind: type[Kind], model: nn.Module) -> Kind:
    """A contender with a copy of the model of its own."""
    return kind(copy.deepcopy(model))


def seconds(contender: Contender, batches: Sequence[Batch]) -> float:
    """The seconds that a second pass takes."""
    contender.run(batches)
    start = time.perf_counter()
    contender.run(batches)
    return time.perf_counter() - start
