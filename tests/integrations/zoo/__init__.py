"""Models as their libraries have them, tiny and random, and the method that each must take."""

from tests.integrations.zoo import (
    adapters,
    audio,
    decoders,
    diffusers,
    encoders,
    graphs,
    timm,
    translators,
    vision,
)
from tests.integrations.zoo.entry import Entry
from tests.support.torchvision import import_torchvision

import_torchvision()  # before a library looks for it

ZOO: dict[str, dict[str, Entry]] = {
    "decoders of transformers": decoders.ENTRIES,
    "encoders of transformers": encoders.ENTRIES,
    "encoder-decoders of transformers": translators.ENTRIES,
    "vision of transformers": vision.ENTRIES,
    "audio of transformers": audio.ENTRIES,
    "timm": timm.ENTRIES,
    "diffusers": diffusers.ENTRIES,
    "PyTorch Geometric": graphs.ENTRIES,
    "PEFT": adapters.ENTRIES,
}
"""Entries by family and name."""
