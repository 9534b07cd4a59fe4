"""One consolidation of a model at a time, over all threads.

A consolidation puts its model into eval mode, takes the gradients out of it, and puts everything
back in the end. Beside another one it would put back what that one has left in the model.
"""

import threading
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()


def turn(model: nn.Module) -> AbstractContextManager[Any]:
    """A context that only one thread at a time can be in; it may enter again inside.

    Args:
        model: The unwrapped model.
    """
    return _locks.setdefault(model, threading.RLock())
