"""Several processes on this machine that run a function together, over gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def together(count: int, task: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task on each of `count` processes of one thread; returns what the first one returned.

    Args:
        count: How many processes.
        task: A function of a module.
        arguments: What it is called with, on every process.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_work, args=(rank, count, store, task, arguments, results))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        found = dict(results.get(timeout=600) for _ in processes)
        for process in processes:
            process.join()
    return found[0]


def _work(
    rank: int,
    count: int,
    store: str,
    task: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Any,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", rank=rank, world_size=count, init_method=f"file://{store}")
    results.put((rank, task(*arguments)))
    dist.destroy_process_group()
