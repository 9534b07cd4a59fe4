"""Models of the sizes that an accelerator is bought for, and random data for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _device import DEVICE
from _models import GPT, Batch, Workload, part, tokens
from torch import Tensor, nn


class GPT2(GPT):
    """GPT-2: its head is its embedding. The defaults are the small one, 124 million parameters."""

    def __init__(
        self,
        vocabulary: int = 50257,
        width: int = 768,
        positions: int = 1024,
        layers: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__(vocabulary, width, positions, layers)
        for block in self.blocks:
            block.heads = heads
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.token.weight


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.skip = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.skip(x))


class ResNet50(nn.Module):
    """ResNet-50, its batch norms with running statistics; 25.6 million parameters."""

    def __init__(
        self, width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            for place in range(count):
                stride = 2 if stage and not place else 1
                layers.append(_Bottleneck(inputs, width * 2**stage, stride))
                inputs = 4 * width * 2**stage
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, classes]` of images `[N, 3, H, W]`."""
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


def images(classes: int, pixels: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Normal pixels in three channels, one class for each image."""
    return lambda n: (torch.randn(n, 3, pixels, pixels), torch.randint(classes, (n,)))


def prepared(workload: Workload) -> tuple[nn.Module, list[Batch]]:
    """The model in eval mode, its running statistics those of the data, and batches."""
    torch.manual_seed(0)
    model = workload.build().to(DEVICE)
    batches = [
        (batch[0].to(DEVICE), batch[1].to(DEVICE)) for batch in workload.data(workload.batches)
    ]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        model.train()(part(batches[0], 0, 16)[0])
    return model.eval(), batches


LARGE = [
    Workload("GPT-2 small", GPT2, tokens(50257, 512), 8, 4),
    Workload("ResNet-50", ResNet50, images(1000, 224), 64, 4),
]
QUICK = [
    Workload("GPT-2 small", lambda: GPT2(20, 8, 6, 1, 2), tokens(20, 6), 4, 2),
    Workload("ResNet-50", lambda: ResNet50(2, (1, 1), 5), images(5, 24), 4, 2),
]
