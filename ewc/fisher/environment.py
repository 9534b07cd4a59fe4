"""What is switched on in the thread and in the process that a consolidation runs in."""

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _python_dispatch

from ewc import _vmap
from ewc._restoring import Restore, Value, restoring
from ewc._switches import all_holds

_C: Any = torch._C  # its parts carry no annotations
_top_hooks = getattr(_C._autograd, "_top_saved_tensors_default_hooks", None)
_functorch = _C._functorch
# PyTorch itself lists them only on newer versions.
_KINDS = ("cpu", "cuda", "mtia", "maia", "xpu", "ipu", "hpu", "xla", "privateuseone", "mps")
_AUTOCASTS = tuple(filter(torch.amp.is_autocast_available, _KINDS))


def undisturbed(
    run: Callable[[], Value], *, always: Sequence[Restore] = (), on_failure: Sequence[Restore] = ()
) -> Value:
    """Run outside of inference mode, and leave everything in the thread and the process as it was.

    Args:
        run: What to run.
        always: Restore more, after that. See `restoring`.
        on_failure: Restore still more, if it fails.
    """
    environment = Environment()

    def run_outside() -> Value:
        environment.enter()
        return run()

    return restoring(run_outside, always=[environment.restore, *always], on_failure=on_failure)


class Environment:
    """What was switched on when this was made, to be restored.

    These are gradients and inference mode; autocast; function modes, dispatch modes and transforms
    such as `vmap`; hooks on saved tensors; and the switches of the whole process that this thread
    holds. A context manager restores its own part of it, unless it is interrupted.
    """

    def __init__(self) -> None:
        self._modes = _get_current_function_mode_stack()
        self._n_dispatch_modes = torch._C._len_torch_dispatch_stack()
        self._depth = _vmap.depth()
        self._gradients = torch.is_grad_enabled()
        keys = (
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set(),
        )
        self._keys = torch._C._ForceDispatchKeyGuard(*keys)
        self._outside: Any = None
        self._hooks = None if _top_hooks is None else _top_hooks(True)
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in _AUTOCASTS
        ]
        self._caches_casts = torch.is_autocast_cache_enabled()
        self._n_autocasts = _n_autocasts()
        self._allowed = (
            _functorch.get_single_level_autograd_function_allowed(),
            _functorch.get_inplace_requires_grad_allowed(),
        )
        self._holds = all_holds()

    def enter(self) -> None:
        """Leave inference mode until `restore`; its tensors would be of no use outside of it."""
        self._keys.__enter__()
        self._outside = torch._C._InferenceMode(False)

    def restore(self) -> None:
        """Restore all; it may be called several times."""
        for switch, holds in self._holds:
            switch.keep(holds)
        if list(map(id, _get_current_function_mode_stack())) != list(map(id, self._modes)):
            while torch._C._len_torch_function_stack():
                _pop_mode()
            for mode in self._modes:
                _push_mode(mode)
        while torch._C._len_torch_dispatch_stack() > self._n_dispatch_modes:
            _python_dispatch._pop_mode()
        _vmap.unwind(self._depth)
        single_level, inplace = self._allowed
        _functorch.set_single_level_autograd_function_allowed(single_level)
        _functorch.set_inplace_requires_grad_allowed(inplace)
        while _top_hooks is not None and _top_hooks(True) not in (None, self._hooks):
            _C._autograd._pop_saved_tensors_default_hooks()
        while _n_autocasts() > self._n_autocasts:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(self._caches_casts)
        for kind, enabled, dtype in self._autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        if self._outside is not None:
            self._outside.__exit__(None, None, None)
        self._keys.__exit__(None, None, None)  # what else transforms have left in the dispatcher
        torch._C._set_grad_enabled(self._gradients)


def _n_autocasts() -> int:
    """How deep contexts of autocast are nested, which only changing it tells.

    Both calls are made in one step of the interpreter, which nothing interrupts.
    """
    calls = (torch.autocast_increment_nesting, torch.autocast_decrement_nesting)
    _, found = map(methodcaller("__call__"), calls)
    return int(found)
