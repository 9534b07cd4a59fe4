"""Random data for the zoo: texts, images, sounds, and what they are labelled with."""

import torch
from torch import Tensor

SAMPLES, LENGTH, WORDS, CLASSES = 4, 7, 40, 3


def numbers(*shape: int) -> Tensor:
    """Of a normal distribution, `[SAMPLES, *shape]`."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)


def classes(*shape: int, most: int = CLASSES) -> Tensor:
    """Classes, `[SAMPLES, *shape]`."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(most, (SAMPLES, *shape), generator=generator)


def texts(length: int = LENGTH) -> dict[str, Tensor]:
    """Two of full length first, so that a mask is needed only later."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([length, length, length - 3, length - 1])
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    ids = torch.randint(3, WORDS, (SAMPLES, length), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}


def labelled_texts(length: int = LENGTH) -> dict[str, Tensor]:
    """Texts, and a class for each."""
    return {**texts(length), "labels": classes()}


def language() -> dict[str, Tensor]:
    """Texts that are their own labels."""
    data = texts()
    return {**data, "labels": data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)}


def answers() -> dict[str, Tensor]:
    """What a decoder reads and has to write; the end of one of them is padding."""
    labels = classes(4, most=WORDS - 3) + 3
    inputs = labels.roll(1, 1)
    inputs[:, 0] = 2
    labels[1, 2:] = -100
    return {"decoder_input_ids": inputs, "labels": labels}


def images(size: int, *shape: int) -> dict[str, Tensor]:
    """Images, `[SAMPLES, *shape, 3, size, size]`, as transformers take them; a class for each."""
    return {"pixel_values": numbers(*shape, 3, size, size), "labels": classes()}


def sounds(length: int = 64) -> dict[str, Tensor]:
    """Waves, and a class for each."""
    return {"input_values": numbers(length), "labels": classes()}


def masked_sounds(length: int = 64) -> dict[str, Tensor]:
    """Waves of several lengths, padded."""
    lengths = torch.tensor([length, length, length - 24, length - 12])
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    return {**sounds(length), "attention_mask": mask}
