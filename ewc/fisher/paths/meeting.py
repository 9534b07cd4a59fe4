"""Acts where parameters meet samples.

A model runs on single samples inside `vmap`, while a `TorchFunctionMode` sees every call of a
PyTorch function. A call in which an effective weight (`weights.py`) meets a tensor with samples is
a *meeting*. There the first of these is done that applies:

1. a *decomposition* replaces the call by simpler ones, each of which is seen in turn;
2. a *rule* computes the output, and says what the per-sample gradients of the weight are;
3. the body of a function of PyTorch that is written in Python is run call by call;
4. the weight is replaced by a *copy per sample* (an expanded view, without memory of its own), for
   this call alone: the gradient of the copy is the per-sample gradient.

Other calls go on as they are, with these exceptions. The rules in `ALWAYS` also serve calls without
weights. A linear layer that makes a smaller weight, as in a hypernetwork, runs once for each
sample. A value that the model reads must be the same for all samples (`branches.py`). Memory into
which samples are written becomes one per sample (`memory.py`). What `vmap` refuses is called once
for each sample (`per_sample.py`). What would give wrong gradients is an error, and the loop is run.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ewc import _vmap
from ewc.fisher.gradients import Dense, Gradient
from ewc.fisher.paths.assembly import Assembly
from ewc.fisher.paths.calls import Calls
from ewc.fisher.paths.weights import Weight, Weights, is_weight
from ewc.fisher.rules.registry import ALWAYS, DECOMPOSITIONS, RULES, NotCovered, accepts

_REVERSE = {torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward}

_STRIDED = {torch.as_strided, torch.Tensor.as_strided}


class PerSampleMode(TorchFunctionMode):
    """One forward pass of a model on N samples inside `vmap`; the `Operation` of the rules.

    Args:
        parameters: The protected parameters by name.
        samples: N.
        assembly: Receives the gradients in the reverse pass.

    Attributes:
        level: The nesting level of that `vmap`, which runs in the present context.
        weights: The effective weights that were met.
        calls: What acts in the calls that no rule takes.
        is_hooked: Whether the model has registered a hook on a tensor without samples.
        seen: The functions that were called, in order.
    """

    def __init__(self, parameters: Mapping[str, Tensor], samples: int, assembly: Assembly) -> None:
        super().__init__()
        self.level = _vmap.level() + 1
        self.weights = Weights(parameters)
        self.calls = Calls(samples, self.level)
        self.is_hooked = False
        self.seen: list[Callable[..., Any]] = []
        self._samples = samples
        self._assembly = assembly
        self._copies: dict[Weight, Tensor] = {}
        self._kept: dict[int, int] = {}

    @property
    def kept_bytes(self) -> int:
        """The memory of the inputs and outputs of all operations with a rule."""
        return sum(self._kept.values())

    @property
    def copied_bytes(self) -> int:
        """The memory of the written-out gradients of copies, for one sample."""
        return sum(w.layout.numel() * w.layout.element_size() for w in self._copies)

    def is_copied(self, weight: Weight, leaves: Collection[int]) -> bool:
        """Whether a weight lacked a rule in an operation that the outputs depend on.

        Args:
            weight: The weight.
            leaves: The ids of the leaves of the outputs' graph.
        """
        return weight.lacks_rule and id(self._copies[weight]) in leaves

    # The interface for rules: `Operation`.

    def samples(self, tensor: Tensor) -> Tensor:
        """See `Operation.samples`."""
        if self.is_protected(tensor):
            return self._copy(tensor)
        physical = _vmap.physical(tensor, self.level)
        if physical is None:
            return tensor.expand(self._samples, *tensor.shape)
        self._count_bytes(physical)
        return physical

    def is_protected(self, tensor: object) -> bool:
        """See `Operation.is_protected`."""
        return is_weight(tensor) and self.weights[tensor] is not None

    def value(self, weight: Tensor) -> Tensor:
        """See `Operation.value`."""
        if _vmap.is_batched(weight, self.level) or weight.is_complex():
            raise NotCovered
        return weight.detach()

    def shared(self, tensor: Tensor) -> Tensor:
        """See `Operation.shared`."""
        return self.calls.shared(tensor)

    def record(
        self, output: Tensor, gradients: Mapping[Tensor | None, Callable[[Tensor], Gradient]]
    ) -> Tensor:
        """See `Operation.record`."""
        uses: list[tuple[Weight, Callable[[Tensor], Gradient]]] = []
        for tensor, gradient in gradients.items():
            weight = self.weights[tensor] if is_weight(tensor) else None
            if weight is not None:
                weight.uses += 1
                uses.append((weight, gradient))
        if not uses:
            return output
        self._count_bytes(output)

        assembly = self._assembly  # the hook must not hold the mode, which holds the copies

        def receive(g: Tensor) -> None:
            for weight, gradient in uses:
                assembly.receive(weight, gradient(g.detach()))
            if assembly.is_last:
                uses.clear()  # and with it what the rules have kept

        if not output.requires_grad:
            root = output.detach().requires_grad_()
            root.register_hook(receive)
            return _alias(root)
        if output._is_view():
            output = _alias(output)
        output.register_hook(receive)
        return output

    # The interface for PyTorch.

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Perform one call of `func`."""
        self.seen.append(func)
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            # Seeded in the forward, it gives each sample alone the same numbers; vmap others.
            raise RuntimeError("the model draws from a generator of its own")
        if func is torch.Tensor.__contains__:
            func, args = torch.Tensor.__bool__, ((args[0] == args[1]).any(),)
        if self.calls.concerns(func, kwargs):
            args, kwargs = self.calls.with_own_memory(func, args, kwargs, self._copy_of)
            if self.calls.handles(func, args):
                return self.calls.handle(func, args, kwargs)
        if func is torch.Tensor.register_hook and not _vmap.is_batched(args[0]):
            self.is_hooked = True
        at_level = _vmap.level() == self.level
        if func in _REVERSE and at_level:
            # The hooks of the rules would receive these gradients; they are for those of the terms.
            raise RuntimeError("the model differentiates by autograd inside its forward")
        if func in _STRIDED and self._shares_memory(args[0]):
            # All samples of a copy lie in the same memory, so autograd would divide its gradient.
            raise RuntimeError("the model reads a copy of a parameter by as_strided")
        if not torch.is_grad_enabled():
            return self.calls(func, args, kwargs)
        if not at_level:  # inside a transform of the model's own, to which no rule applies
            return func(*self._with_copies(args), **self._with_copies(kwargs))
        meets = self._meets(args, kwargs)
        if not meets and func is F.linear and self._is_generator(args):
            with _vmap.beneath():
                input = self.samples(args[0])
            args, meets = (self._logical(input), *args[1:]), True
        if not meets and func not in ALWAYS:
            return self.calls(func, args, kwargs)
        try:
            if meets and accepts(DECOMPOSITIONS.get(func), args, kwargs):
                with self:
                    return DECOMPOSITIONS[func](*args, **kwargs)
            if accepts(RULES.get(func), (self, *args), kwargs):
                with _vmap.beneath():
                    outputs = RULES[func](self, *args, **kwargs)
                return self._logical(outputs)
        except NotCovered:
            pass
        if not meets:
            return self.calls(func, args, kwargs)
        body = _body(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        return self.calls(func, self._with_copies(args), self._with_copies(kwargs))

    def _copy_of(self, tensor: Tensor) -> Tensor | None:
        """The copies of a tensor, which no rule will use; None if it is not an effective weight."""
        weight = self.weights[tensor]
        if weight is None:
            return None
        weight.lacks_rule = True
        return self._copy(tensor)

    def _meets(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an effective weight is among the arguments of a call, and a tensor with samples.

        Called for every operation of the model: hence no walk through nested arguments.
        """
        weights, samples = False, False
        for argument in (*args, *kwargs.values()):
            for each in argument if isinstance(argument, (tuple, list)) else (argument,):
                if isinstance(each, Tensor):
                    if _vmap.is_batched(each):
                        samples = True
                    elif not weights and each.requires_grad:
                        weights = self.weights[each] is not None
        return weights and samples

    def _is_generator(self, args: tuple[Any, ...]) -> bool:
        """Whether a linear layer makes a weight smaller than its own, as in a hypernetwork.

        To run it once for each sample, by the rule of `F.linear`, then costs less than to lead
        gradients back, which writes out those of its own weight for each sample.
        """
        if len(args) < 2 or _vmap.is_wrapped(args[0]) or not self.is_protected(args[1]):
            return False
        input, weight = args[:2]
        return weight.dim() == 2 and int(input.numel()) < int(weight.shape[1]) ** 2

    def _logical(self, outputs: Any) -> Any:
        """What a rule returned, as the model sees it."""
        if isinstance(outputs, Tensor):
            return _vmap.logical(outputs, self.level)
        return tree_map_only(Tensor, lambda out: _vmap.logical(out, self.level), outputs)

    def _with_copies(self, arguments: Any) -> Any:
        """The arguments of a call, each effective weight replaced by its copies."""

        def replace(tensor: Tensor) -> Tensor:
            outer = _vmap.inner(tensor, self.level)  # as it is outside the model's transforms
            if not self.is_protected(outer):
                return tensor
            with _vmap.below(self.level):
                copies = self._copy_of(outer)
            assert copies is not None
            return _vmap.with_samples_of(_vmap.logical(copies, self.level), tensor, self.level)

        return tree_map_only(Tensor, replace, arguments)

    def _copy(self, tensor: Tensor) -> Tensor:
        """A copy of a weight for each sample, `[N, *shape]`; to be called beneath the `vmap`."""
        weight = self.weights[tensor]
        assert weight is not None
        if weight not in self._copies:
            root = tensor.detach().expand(self._samples, *tensor.shape).requires_grad_()
            assembly = self._assembly  # as in `record`
            root.register_hook(lambda g: assembly.receive(weight, Dense(g.detach())))
            weight.uses += 1
            self._copies[weight] = root
        return self._copies[weight]

    def _shares_memory(self, tensor: Tensor) -> bool:
        """Whether all samples of a tensor lie in the same memory, as those of a copy do."""
        physical = _vmap.physical(tensor, self.level)
        return physical is not None and physical.stride(0) == 0

    def _count_bytes(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._kept[storage.data_ptr()] = storage.nbytes()


def _alias(tensor: Tensor) -> Tensor:
    """The same tensor, but neither leaf nor view: operations in place may write to it."""
    alias: Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return alias


@cache
def _body(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function of PyTorch that is written in Python, so that its calls are seen one by one.

    Such a function first asks whether a mode overrides it. Here the answer is always no, so that
    its body runs under the mode. None for other functions.
    """
    if not isinstance(func, FunctionType) or func.__module__ not in (
        "torch.nn.functional",
        "torch.functional",
    ):
        return None
    answers = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
        lambda *tensors: False,
    )
    body = FunctionType(
        func.__code__, {**func.__globals__, **answers}, func.__name__, None, func.__closure__
    )
    body.__defaults__, body.__kwdefaults__ = func.__defaults__, func.__kwdefaults__
    return body
