"""Data sharded over processes that each hold the whole model."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ewc import EWC, Classification, OnlineEWC
from tests import oracle
from tests.distributed.workers import Workers
from tests.support.asserts import raises
from tests.support.tasks import make_model, make_task


def shares(rank: int, world: int, sizes: list[int]) -> tuple[list, tuple]:
    """This rank's batches, of other sizes than the others', and all samples as one batch."""
    task = [make_task(seed, batches=1, size=size) for seed, size in enumerate(sizes) if size]
    joined = tuple(torch.cat(column) for column in zip(*[t[0] for t in task], strict=True))
    begin = sum(sizes[:rank])
    x, y = (each[begin : begin + sizes[rank]] for each in joined)
    step = 2 + rank
    return [(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step)], joined


def expected(model: nn.Module, batch: tuple) -> dict[str, torch.Tensor]:
    def nll(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    sums = oracle.empirical(model, batch, nll)
    return {name: each / len(batch[1]) for name, each in sums.items()}


def assert_equal(found: dict, right: dict) -> None:
    assert list(found) == list(right)
    for name, each in right.items():
        torch.testing.assert_close(found[name].double(), each, rtol=1e-5, atol=1e-12)


def uneven(rank: int, world: int, sizes: list[int], wrapped: bool) -> None:
    own, joined = shares(rank, world, sizes)
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(rank))
    outer = DistributedDataParallel(model) if wrapped else model
    for kind in (EWC, OnlineEWC):
        ewc = kind(outer, Classification())
        summary = ewc.consolidate(own)
        assert summary.samples == sum(sizes)
        assert set(summary.paths.values()) == {"rule"}
        assert_equal(ewc.fisher, expected(model, joined))
        assert all((p.grad == rank).all() for p in model.parameters())


def test_row_46_uneven_shards(workers: Workers) -> None:
    workers.run(uneven, [5, 9, 2, 4][: workers.world], True)


def test_row_46_an_empty_rank(workers: Workers) -> None:
    workers.run(uneven, [0, 9, 2, 4][: workers.world], False)


def nothing(rank: int, world: int) -> None:
    ewc = EWC(make_model(), Classification())
    with raises(ValueError, "at least one sample"):
        ewc.consolidate([])
    assert ewc.n_tasks == 0


def test_row_46_all_ranks_empty(two: Workers) -> None:
    two.run(nothing)
