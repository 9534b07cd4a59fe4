"""Data sharded over processes that each hold the whole model."""

import torch
from torch.nn.parallel import DistributedDataParallel

from ewc import EWC, Classification, OnlineEWC
from tests import oracle
from tests.distributed.models import share
from tests.distributed.workers import Workers
from tests.support.asserts import assert_close, raises
from tests.support.tasks import make_model, make_task


def shares(rank: int, world: int, sizes: list[int]) -> tuple[list, tuple]:
    """This rank's batches, of other sizes than the others', and all samples as one batch."""
    task = [make_task(seed, batches=1, size=size) for seed, size in enumerate(sizes) if size]
    joined = tuple(torch.cat(column) for column in zip(*[t[0] for t in task], strict=True))
    return share(joined, rank, sizes), joined


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
        assert_close(ewc.fisher, oracle.fisher(model, [joined]), 1e-12, relative=1e-5)
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
