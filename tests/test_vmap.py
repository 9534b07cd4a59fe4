"""The levels of `vmap`, left and entered again."""

import pytest
import torch
from torch import Tensor
from torch._C import _functorch

from ewc import _vmap


def test_a_level_that_was_left_running_beneath_is_ended() -> None:
    def run(x: Tensor) -> Tensor:
        at = _vmap.depth()
        with _vmap.beneath():
            _functorch._vmap_increment_nesting(2, "error")
        assert _vmap.depth() == at
        return 2 * x

    assert torch.equal(torch.func.vmap(run)(torch.arange(3)), torch.tensor([0, 2, 4]))
    assert _vmap.depth() == 0


@pytest.mark.parametrize("left", [0, 1, 2])
def test_all_kinds_of_transforms_are_ended(left: int) -> None:
    for begin in (
        lambda: _functorch._vmap_increment_nesting(2, "error"),
        _functorch._grad_increment_nesting,
        _functorch._jvp_increment_nesting,
        lambda: _functorch._func_increment_nesting(False),
    ):
        begin()
    _vmap.unwind(left)
    assert _vmap.depth() == left
    _vmap.unwind(0)
    assert _vmap.depth() == 0
    assert torch.equal(torch.func.vmap(torch.sin)(torch.zeros(2)), torch.zeros(2))
