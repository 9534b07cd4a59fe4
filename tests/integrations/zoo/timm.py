"""Image models of timm."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from tests.integrations.zoo.data import CLASSES, classes, numbers
from tests.integrations.zoo.entry import Entry
from tests.integrations.zoo.task import CLASS

TWO: dict[str, Any] = {"embed_dims": (8, 8), "depths": (1, 1), "num_heads": (1, 2)}
PATCHES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16}
VIT = {**PATCHES, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2)}


def named(name: str, size: int = 32, options: Any = None, **entry: Any) -> Entry:
    """A registered model.

    Args:
        name: Its name; `test_` are timm's own tiny models.
        size: Of its images.
        options: Of the model.
        entry: Fields of the entry.
    """

    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, num_classes=CLASSES, **(options or {}))
        return model

    return Entry("timm", make, images(size), CLASS, **entry)


def built(file: str, kind: str, size: int = 32, options: Any = None, **entry: Any) -> Entry:
    """A class of one of timm's files, smaller than those that are registered."""

    def make() -> nn.Module:
        module = import_module(f"timm.models.{file}")
        model: nn.Module = getattr(module, kind)(num_classes=CLASSES, **(options or {}))
        return model

    return Entry("timm", make, images(size), CLASS, **entry)


def images(size: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (numbers(3, size, size), classes())


def checkpointed(entry: Entry) -> Entry:
    """With the activations of each block computed twice."""

    def change(model: Any) -> None:
        model.set_grad_checkpointing()

    return entry.changed(change)


VISION_TRANSFORMER = named("test_vit", options={"img_size": 32})
CONVNEXT = named("test_convnext")

ENTRIES: dict[str, Entry] = {
    "ResNet": named("test_resnet"),
    "EfficientNet": named("test_efficientnet"),
    "EfficientNet, EvoNorm": named("test_efficientnet_evos"),
    "NFNet": named("test_nfnet"),
    "BYOBNet": named("test_byobnet"),
    "ConvNeXt": CONVNEXT,
    "ConvNeXt, checkpointed": checkpointed(CONVNEXT),
    "ConvNeXt V2": named("test_convnext2"),
    "ViT": VISION_TRANSFORMER,
    "ViT, checkpointed": checkpointed(VISION_TRANSFORMER),
    "ViT, registers": named("test_vit4", options={"img_size": 32}),
    "ViT, relative positions": named("test_vit_relpos", options={"img_size": 32}),
    "MambaOut": named("test_mambaout"),
    "MaxViT": named("test_maxvit", 64, {"img_size": 64}),
    "CoAtNet": named("test_coatnet", 64, {"img_size": 64}),
    "MobileNetV3": named("mobilenetv3_small_050"),
    "MobileNetV4": named("mobilenetv4_conv_small_035"),
    "RegNet": named("regnetx_002"),
    "DenseNet": built("densenet", "DenseNet", options={"growth_rate": 4, "block_config": (2, 2)}),
    "RepViT": named("repvit_m0_9", options={"embed_dim": (8, 8, 8, 8), "depth": (1, 1, 1, 1)}),
    "StarNet": named("starnet_s1", options={"base_dim": 8, "depths": (1, 1, 1, 1)}),
    "ConvMixer": built(
        "convmixer",
        "ConvMixer",
        options={"dim": 8, "depth": 2, "kernel_size": 3, "patch_size": 4},
    ),
    "EdgeNeXt": built(
        "edgenext",
        "EdgeNeXt",
        options={
            "dims": (8, 8, 8, 8),
            "depths": (1, 1, 1, 1),
            "global_block_counts": (0, 1, 1, 1),
            "kernel_sizes": (3, 3, 3, 3),
            "heads": (2, 2, 2, 2),
            "d2_scales": (2, 2, 2, 2),
            "ls_init_value": 0.1,
        },
    ),
    "FastViT": named(
        "fastvit_t8",
        64,
        {
            "layers": (1, 1, 1, 1),
            "embed_dims": (8, 8, 16, 32),
            "token_mixers": ("repmixer", "repmixer", "repmixer", "attention"),
            "mlp_ratios": (2, 2, 2, 2),
        },
    ),
    "LeViT": built(
        "levit",
        "Levit",
        options={
            "img_size": 32,
            "embed_dim": (16, 24),
            "key_dim": 4,
            "depth": (1, 1),
            "num_heads": (2, 2),
        },
        rows=True,
    ),
    "XCiT": built(
        "xcit",
        "Xcit",
        16,
        {**PATCHES, "depth": 1, "num_heads": 2, "cls_attn_layers": 1, "eta": 0.1},
        rows=True,
    ),
    "EfficientFormer": built(
        "efficientformer",
        "EfficientFormer",
        224,
        {"depths": (1, 1, 1, 1), "embed_dims": (4, 4, 8, 8), "num_vit": 1},
        rows=True,
    ),
    "EfficientFormerV2": named(
        "efficientformerv2_s0",
        options={
            "img_size": 32,
            "embed_dims": (8, 8, 16, 16),
            "depths": (1, 1, 1, 1),
            "num_vit": 1,
            "mlp_ratios": ((2,), (2,), (2,), (2,)),
        },
        rows=True,
    ),
    "TinyViT": built("tiny_vit", "TinyVit", options={**TWO, "window_sizes": (4, 4)}, rows=True),
    "Mixer": built("mlp_mixer", "MlpMixer", 16, {**PATCHES, "num_blocks": 2}),
    "PiT": built(
        "pit",
        "PoolingVisionTransformer",
        options={
            "img_size": 32,
            "patch_size": 8,
            "stride": 4,
            "base_dims": (8, 8),
            "depth": (1, 1),
            "heads": (1, 2),
            "mlp_ratio": 2,
        },
    ),
    "CaiT": built(
        "cait", "Cait", 16, {**PATCHES, "depth": 1, "num_heads": 2, "depth_token_only": 1}
    ),
    "CoaT": built(
        "coat",
        "CoaT",
        options={
            "img_size": 32,
            "patch_size": 4,
            "embed_dims": (16, 16, 16, 16),
            "serial_depths": (1, 1, 1, 1),
            "parallel_depth": 1,
            "num_heads": 8,
            "mlp_ratios": (2, 2, 2, 2),
        },
    ),
    "Twins": built(
        "twins",
        "Twins",
        options={
            "img_size": 32,
            "patch_size": 4,
            "embed_dims": (8, 8),
            "num_heads": (1, 2),
            "mlp_ratios": (2, 2),
            "depths": (2, 1),
            "sr_ratios": (2, 1),
            "wss": (2, 2),
        },
    ),
    "Swin": built("swin_transformer", "SwinTransformer", 16, {**SWIN, "window_size": 4}),
    "Swin V2": built("swin_transformer_v2", "SwinTransformerV2", 16, {**SWIN, "window_size": 4}),
    "DeiT, distilled": built("deit", "VisionTransformerDistilled", 16, VIT),
    "BEiT": built("beit", "Beit", 16, {**VIT, "use_rel_pos_bias": True, "init_values": 0.1}),
    "EVA": built("eva", "Eva", 16, {**VIT, "use_rot_pos_emb": True, "swiglu_mlp": True}),
    "PVTv2": built(
        "pvt_v2",
        "PyramidVisionTransformerV2",
        options={**TWO, "sr_ratios": (2, 1), "mlp_ratios": (2, 2)},
    ),
    "PoolFormer": built("metaformer", "MetaFormer", options={"depths": (1, 1), "dims": (8, 8)}),
    "Sequencer": built(
        "sequencer",
        "Sequencer2d",
        16,
        {
            "img_size": 16,
            "layers": (1, 1),
            "patch_sizes": (4, 2),
            "embed_dims": (8, 8),
            "hidden_sizes": (4, 4),
            "mlp_ratios": (2, 2),
        },
    ),
    "NesT": built(
        "nest", "Nest", options={**TWO, "img_size": 32, "patch_size": 4, "num_levels": 2}
    ),
}
