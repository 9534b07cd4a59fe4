"""Two processes train one sharded model on two tasks; one process continues from the checkpoint.

    torchrun --standalone --nproc-per-node 2 sharded.py     # trains, and writes a checkpoint
    python sharded.py                                       # continues from it

The tasks are scikit-learn's digits 0 to 4, and 5 to 9 as the same five classes. Each process has
every second sample and half of every parameter. It also works with one process, or four.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from ewc import EWC, Classification

CLASSES = 5
Digits = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "ewc-digits"
    )
    folder = parser.parse_args().checkpoint
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tasks = [digits(0), digits(CLASSES)]
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        train_and_save(tasks, folder)
        dist.destroy_process_group()
    else:
        resume(tasks, folder)


def train_and_save(tasks: list[Digits], folder: Path) -> None:
    """Learn both tasks on all processes, and write a checkpoint that all of them share."""
    model = build()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    regularizer = EWC(model, Classification())
    for task in tasks:
        train(model, regularizer, task)
        summary = regularizer.consolidate(loader(task))  # every process over its own samples
        say(str(summary))
        say(f"accuracy: {report(model, tasks)}")
    held = sum(each.to_local().numel() for each in regularizer.fisher.values())
    say(f"entries of the Fisher that this process holds: {held} of {count(model)}")
    dcp.save({"model": model.state_dict(), "ewc": regularizer.state_dict()}, checkpoint_id=folder)


def resume(tasks: list[Digits], folder: Path) -> None:
    """Continue in one process from the same checkpoint, with a model that is not sharded."""
    model = build()
    regularizer = EWC(model, Classification())
    state = {"model": model.state_dict(), "ewc": regularizer.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state["model"])
    regularizer.load_state_dict(state["ewc"])
    first, second = accuracies(model, tasks)
    say(f"{regularizer}\naccuracy: {report(model, tasks)}")
    assert regularizer.n_tasks == 2
    assert min(first, second) > 0.65, "the processes must have learned both tasks"

    # For comparison, the second task once more without the penalty.
    regularizer.strength = 0.0
    train(model, regularizer, tasks[1])
    say(f"after more of the second task, without the penalty: {report(model, tasks)}")
    assert accuracies(model, tasks)[0] < first - 0.2


def train(model: nn.Module, regularizer: EWC, task: Digits, epochs: int = 6) -> None:
    """The usual loop, on any number of processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(epochs):
        for x, y in loader(task):
            loss = F.cross_entropy(model(x), y) + regularizer()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def digits(first: int) -> Digits:
    """Five digits from `first` on, as classes 0 to 4; `x` is [samples, 64] in [0, 1]."""
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    chosen = (y >= first) & (y < first + CLASSES)
    return x[chosen], y[chosen] - first


def loader(task: Digits) -> DataLoader[tuple[Tensor, ...]]:
    """Every process's own samples. All have equally many, or training would never end."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = TensorDataset(*(each[rank::world][: len(each) // world] for each in task))
    return DataLoader(own, batch_size=32 // world, shuffle=True)


def accuracies(model: nn.Module, tasks: list[Digits]) -> list[float]:
    """The share of right answers in each task."""
    with torch.no_grad():
        return [(model(x).argmax(1) == y).float().mean().item() for x, y in tasks]


def report(model: nn.Module, tasks: list[Digits]) -> str:
    return ", ".join(f"task {n} {a:.1%}" for n, a in enumerate(accuracies(model, tasks), 1))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def say(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text)


if __name__ == "__main__":
    main()
