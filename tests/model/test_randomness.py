import random

import numpy as np
import pytest
import torch

from ewc.model.randomness import Randomness


@pytest.fixture
def randomness():
    torch.manual_seed(0)
    return Randomness([torch.device("cpu")])


def draw(randomness, advance=True):
    with randomness.stream() as advanced:
        value = torch.rand(()).item()
        if advance:
            advanced()
    return value


def test_the_stream_continues_only_after_advance(randomness):
    first = draw(randomness, advance=False)
    assert draw(randomness) == first
    second = draw(randomness)
    assert second != first
    torch.manual_seed(0)
    assert [torch.rand(()).item(), torch.rand(()).item()] == [first, second]


def test_the_global_state_is_kept_also_on_failure(randomness):
    before = torch.get_rng_state()
    first = draw(randomness)

    def failing_run():
        with randomness.stream() as advance:
            torch.rand(())
            advance()
            raise KeyError

    with pytest.raises(KeyError):
        failing_run()
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(randomness) != first  # a failed run does not advance the stream either
    torch.manual_seed(0)
    torch.rand(())
    assert torch.rand(()).item() != first


@pytest.mark.parametrize("own", [False, True], ids=["global", "generator"])
def test_seeds_differ_between_ranks_and_repeat(own):
    def first(seed, rank):
        torch.manual_seed(seed)
        randomness = Randomness([torch.device("cpu")])
        generator = torch.Generator().manual_seed(seed) if own else None
        randomness.seed_from(generator, rank)
        return draw(randomness)

    assert first(3, 0) == first(3, 0)
    assert len({first(3, 0), first(3, 1), first(4, 0)}) == 3


def test_restore_takes_back_all_draws():
    generator = torch.Generator().manual_seed(1)
    randomness = Randomness([torch.device("cpu")], generator)

    def states():
        _, keys, position, *_ = np.random.get_state()
        return [
            torch.get_rng_state().tolist(),
            generator.get_state().tolist(),
            random.getstate(),
            (keys.tolist(), position),
        ]

    before = states()
    torch.rand(())
    torch.rand((), generator=generator)
    random.random()
    np.random.rand()
    assert all(one != other for one, other in zip(states(), before, strict=True))
    randomness.restore()
    assert states() == before
