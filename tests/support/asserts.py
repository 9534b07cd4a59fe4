"""Properties that tests assert again and again."""

import gc
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ewc import EWC, _vmap
from ewc.processes.layout import local
from tests.support import precision


@contextmanager
def unchanged(ewc: EWC | None, model: nn.Module, *generators: torch.Generator) -> Iterator[None]:
    """What happens inside leaves no trace: in the object, the model, or the process."""
    before = _everything(ewc, model, generators)
    yield
    after = _everything(ewc, model, generators)
    assert after.keys() == before.keys()
    changed = [key for key in before if not _equal(before[key], after[key])]
    assert not changed, f"changed: {', '.join(changed)}"


@contextmanager
def raises(kind: Any, *parts: str) -> Iterator[Any]:
    """An error of this kind, whose message has all these parts."""
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


def assert_close(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float = 1e-6,
    *,
    relative: float = 0.0,
) -> None:
    """The same names in the same order, and the same values but for rounding.

    Args:
        found: Tensors by name.
        expected: What they should be.
        tolerance: The error that is allowed, as a share of the largest entry of each tensor.
        relative: What is allowed besides, as a share of each entry.
    """
    assert list(found) == list(expected)
    tops = {
        name: float(each.abs().max()) if each.numel() else 0.0 for name, each in expected.items()
    }
    for name, right in expected.items():
        # A gradient that is zero but for rounding is compared with the largest of all.
        scale = max(tops[name], tolerance**2 * max(tops.values()))
        error = (found[name].double() - right.double()).abs()
        allowed = tolerance * scale + relative * right.double().abs()
        assert (error <= allowed).all(), f"{name}: off by {error.max() / scale:.2e} of the largest"


def fails_at(call: int, error: BaseException) -> Callable[[], None]:
    """A function that raises when it is called for the given time (from 1), and only then."""
    calls = 0

    def tick() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error

    return tick


def _everything(
    ewc: EWC | None, model: nn.Module, generators: tuple[torch.Generator, ...]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if ewc is not None:
        found |= _object(ewc)
    found |= _model(model)
    found |= _process()
    for index, generator in enumerate(generators):
        found[f"generator {index}"] = generator.get_state().clone()
    return found


def _object(ewc: EWC) -> dict[str, Any]:
    found: dict[str, Any] = {
        "n_tasks": ewc.n_tasks,
        "strength": ewc.strength,
        "curvature": dict(ewc._curvature),
        "names": list(ewc.fisher),
        "chosen": ewc._chosen,
        "warned": (ewc._state.warned, ewc._state.warned_slow),
        "likelihood": id(ewc._likelihood),
        "forward": id(ewc._forward),
    }
    for name, known in ewc._state.quadratics.items():
        found[f"fisher of {name}"] = _bits(known.fisher)
        found[f"anchor of {name}"] = _bits(known.anchor)
        found[f"constant of {name}"] = known.constant
    return found


def _model(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = (id(parameter), _bits(parameter))
        found[f"requires_grad of {name}"] = parameter.requires_grad
        found[f"hooks of {name}"] = (
            list((parameter._backward_hooks or {}).items()),
            list((parameter._post_accumulate_grad_hooks or {}).items()),
        )
        grad = parameter.grad
        found[f"gradient of {name}"] = None if grad is None else (id(grad), _bits(grad))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        found[f"buffer {name}"] = (id(buffer), _bits(buffer))
    for name, module in model.named_modules():
        found[f"flag of {name!r}"] = module.training
        spaces = module.__dict__.items()
        found[f"attributes of {name!r}"] = {key: id(value) for key, value in spaces}
        found[f"hooks of {name!r}"] = {
            key: list(value.items()) for key, value in spaces if key.endswith("hooks")
        }
    return found


def _process() -> dict[str, Any]:
    return {
        "RNG of torch": torch.get_rng_state(),
        "RNG of Python": random.getstate(),
        "RNG of NumPy": [
            part.tobytes() if isinstance(part, np.ndarray) else part
            for part in np.random.get_state()
        ],
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "precision of products": precision.settings(),
        "cuDNN": torch.backends.cudnn.enabled,
        "transforms": _vmap.depth(),
        "function modes": list(_get_current_function_mode_stack()),
        "dispatch modes": list(_get_current_dispatch_mode_stack()),
        "dispatch keys": [
            str(torch._C._dispatch_tls_local_include_set()),
            str(torch._C._dispatch_tls_local_exclude_set()),
        ],
        "nesting of autocast": _autocasts(),
        "hooks on saved tensors": _hooks_on_saved_tensors(),
        "stance of the compiler": _stance(),
        "filters of warnings": (id(warnings.filters), list(warnings.filters)),
        "garbage collection": gc.isenabled(),
    }


def _autocasts() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _hooks_on_saved_tensors() -> bool:
    """Whether there are any: they would change what autograd saves."""
    with torch.inference_mode(False), torch.enable_grad():
        node = torch.ones((), requires_grad=True).exp().grad_fn
    assert node is not None
    try:
        node._raw_saved_result.register_hooks(lambda tensor: tensor, lambda tensor: tensor)
    except RuntimeError:  # it has some
        return True
    return False


def _stance() -> Any:
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return "default" if compiler is None else compiler._stance.stance


def _bits(tensor: Tensor) -> Tensor:
    """The values bit for bit, so that NaN equals itself and -0 is not 0."""
    own = local(tensor.detach())
    dense = own.to_dense() if own.is_sparse else own
    return dense.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
