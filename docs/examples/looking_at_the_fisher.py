"""Looking at the Fisher: as a table and as a picture, after two tasks.

A network learns the handwritten digits 0 to 4, and then 5 to 9. Some pixels at the edges are dark
in every image. The outputs do not depend on their weights, so their Fisher information is 0 and EWC
leaves them free. It protects the other weights, those near the output most.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ewc import EWC, Classification
from ewc.plot import plot_fisher

LR = 0.05
EPOCHS = 10


def learn(tasks: list[TensorDataset], epochs: int = EPOCHS) -> EWC:
    """Learn the tasks one after the other; print what each consolidation reports."""
    model = nn.Sequential(
        OrderedDict(
            pixels=nn.Linear(64, 50),
            relu1=nn.ReLU(),
            hidden=nn.Linear(50, 50),
            relu2=nn.ReLU(),
            output=nn.Linear(50, 10),
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    regularizer = EWC(model, Classification())
    for task in tasks:
        loader = DataLoader(task, batch_size=32, shuffle=True)
        for _ in range(epochs):
            for x, y in loader:
                loss = F.cross_entropy(model(x), y) + regularizer()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        summary = regularizer.consolidate(tqdm(loader, desc="consolidate"))
        print(summary)
        assert summary.bound > LR * summary.strength, "the next task could not be learned"
    print("The last one by layer:")
    print(summary.table(rows=3))
    return regularizer


def halves() -> list[TensorDataset]:
    """Scikit-learn's digits: 0 to 4, and 5 to 9."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    return [TensorDataset(x[half], y[half]) for half in (y < 5, y >= 5)]


def check(fisher: dict[str, Tensor], x: Tensor) -> None:
    """What this example claims, of all the images `x` [samples, 64]."""
    weight = fisher["pixels.weight"]  # [50, 64]
    dark = (x == 0).all(0)
    assert dark.any()
    assert (weight[:, dark] == 0).all(), "the weights of dark pixels must be free"
    assert (weight[:, ~dark].sum(0) > 0).all(), "those of all other pixels must not"
    first, last = float(weight.mean()), float(fisher["output.weight"].mean())
    assert last > 2 * first, f"near the output {last:.2g}, near the pixels {first:.2g}"


def main() -> None:
    """Learn, print, draw, and check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="looking_at_the_fisher.png", help="picture")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for products this small
    torch.manual_seed(options.seed)
    tasks = halves()
    regularizer = learn(tasks)
    plot_fisher(regularizer).savefig(options.out, dpi=110, facecolor="white")
    print(f"Picture: {options.out}")
    check(regularizer.fisher, torch.cat([task.tensors[0] for task in tasks]))


if __name__ == "__main__":
    main()
