"""The levels of `vmap`, left and entered again."""

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
