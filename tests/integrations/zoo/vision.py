"""Models of images and videos of transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.integrations.zoo.data import CLASSES, WORDS, classes, images, numbers, texts
from tests.integrations.zoo.decoders import TEXT, checkpointed
from tests.integrations.zoo.entry import Entry
from tests.integrations.zoo.task import CLASS, TOKENS, VALUES

VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 12,
    "patch_size": 6,
}
RELATIVE = {**VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.1}
STAGES: dict[str, Any] = {"num_stages": 2, "depths": [1, 1], "hidden_sizes": [8, 12]}
CONVNEXT = {**STAGES, "patch_size": 2, "layer_scale_init_value": 0.1}
SWIN: dict[str, Any] = {
    "image_size": 12,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 3,
}
BIT = {**STAGES, "hidden_sizes": [16, 32], "embedding_size": 16, "num_groups": 4}
PYRAMID: dict[str, Any] = {
    "image_size": 16,
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [8, 8],
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "sequence_reduction_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [2, 2],
}
PVT = {**PYRAMID, "patch_sizes": [4, 2], "strides": [4, 2]}
SEGFORMER = {**PYRAMID, "decoder_hidden_size": 8}
MOBILENET = {"depth_multiplier": 0.1, "min_depth": 2, "depth_divisible_by": 2, "image_size": 32}
EFFICIENTNET: dict[str, Any] = {
    "image_size": 12,
    "width_coefficient": 0.25,
    "depth_coefficient": 0.3,
    "hidden_dim": 320,
    "in_channels": [8, 8],
    "out_channels": [8, 8],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
}
MOBILEVIT = {
    "image_size": 32,
    "hidden_sizes": [8, 8, 8],
    "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8],
    "num_attention_heads": 2,
    "mlp_ratio": 1.0,
}
POOLFORMER: dict[str, Any] = {
    "hidden_sizes": [8, 8],
    "depths": [1, 1],
    "num_encoder_blocks": 2,
    "patch_sizes": [7, 3],
    "strides": [2, 2],
    "padding": [2, 1],
    "layer_scale_init_value": 0.1,
}
CVT: dict[str, Any] = {
    "patch_sizes": [3, 3, 3],
    "patch_stride": [2, 2, 2],
    "patch_padding": [1, 1, 1],
    "embed_dim": [8, 8, 8],
    "num_heads": [1, 2, 2],
    "depth": [1, 2, 3],
    "mlp_ratio": [2.0, 2.0, 2.0],
}
LEVIT: dict[str, Any] = {
    "image_size": 32,
    "hidden_sizes": [16, 24, 32],
    "num_attention_heads": [2, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [4, 4, 4],
    "kernel_size": 3,
    "down_ops": [["Subsample", 4, 4, 2, 2, 2], ["Subsample", 4, 4, 2, 2, 2]],
}
FOCAL: dict[str, Any] = {
    "image_size": 12,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "hidden_sizes": [8, 16],
    "focal_levels": [1, 1],
    "focal_windows": [3, 3],
    "use_layerscale": True,
}
HIERA: dict[str, Any] = {
    "embed_dim": 8,
    "image_size": [32, 32],
    "depths": [1, 1],
    "num_heads": [1, 2],
    "masked_unit_size": [4, 4],
    "num_query_pool": 1,
}
SWIFT: dict[str, Any] = {
    "image_size": 32,
    "depths": [1, 1, 1, 1],
    "embed_dims": [8, 8, 16, 16],
    "mlp_ratio": 2,
}
PIXELS = {"vocab_size": 17, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
DETR: dict[str, Any] = {
    "backbone_config": {
        "model_type": "resnet",
        **STAGES,
        "embedding_size": 8,
        "out_features": ["stage2"],
    },
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_queries": 3,
}
DPT: dict[str, Any] = {
    **VIT,
    "is_hybrid": False,
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
}
VIDEO = {**VIT, "num_frames": 2}


def model(
    name: str, kind: str, options: dict[str, Any], data: Callable[[], Any], **entry: Any
) -> Entry:
    """A model of that name; a class for each image, unless `entry` says otherwise.

    Args:
        name: Of the model.
        kind: The beginning of the name of its configuration.
        options: Of its configuration.
        data: Makes inputs and labels.
        entry: Fields of the entry.
    """

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**options, num_labels=CLASSES)
        made: nn.Module = getattr(transformers, name)(config)
        return made

    return Entry("transformers", make, data, **{"task": CLASS, **entry})


def classifier(kind: str, options: dict[str, Any], size: int = 12, **entry: Any) -> Entry:
    """A class for a square image of this size."""
    return model(f"{kind}ForImageClassification", kind, options, lambda: images(size), **entry)


def video(kind: str, options: dict[str, Any]) -> Entry:
    """A class for two frames."""
    name = f"{kind}ForVideoClassification"
    return model(name, kind, options, lambda: images(12, 2))


def objects(size: int) -> dict[str, Tensor]:
    """Images, and a class for each of three places."""
    return {**images(size), "labels": classes(3)}


def against_prompts(clip: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """How well each image goes with each of three texts."""
    prompts = torch.arange(3, 3 + 4 * CLASSES).reshape(CLASSES, 4) % WORDS
    outputs = clip(input_ids=prompts, pixel_values=batch["pixel_values"])
    logits: Tensor = outputs.logits_per_image
    return logits


def without_labels(detr: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The classes of the places; a loss that matches places with objects is not wanted."""
    logits: Tensor = detr(batch["pixel_values"]).logits
    return logits


def depth(dpt: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The distance of each pixel."""
    predicted: Tensor = dpt(batch["pixel_values"]).predicted_depth
    return predicted


VISION_TRANSFORMER = classifier("ViT", VIT)

ENTRIES: dict[str, Entry] = {
    "ViT": VISION_TRANSFORMER,
    "ViT, bfloat16": classifier("ViT", VIT, dtype=torch.bfloat16, tolerance=0.1),
    "ViT, checkpointed": checkpointed(VISION_TRANSFORMER),
    "DeiT": classifier("DeiT", VIT),
    "BEiT": classifier("Beit", RELATIVE),
    "Data2Vec, images": classifier("Data2VecVision", RELATIVE),
    "DINOv2": classifier("Dinov2WithRegisters", {**VIT, "mlp_ratio": 2}),
    "I-JEPA": classifier("IJepa", VIT),
    "SigLIP": classifier("Siglip", {"vision_config": VIT}),
    "CLIP, images": classifier("CLIP", {"vision_config": VIT}),
    "CLIP, images and prompts": model(
        "CLIPModel",
        "CLIP",
        {"vision_config": VIT, "text_config": TEXT, "projection_dim": 8},
        lambda: images(12),
        forward=against_prompts,
    ),
    "ViLT": model(
        "ViltForQuestionAnswering",
        "Vilt",
        {**VIT, "vocab_size": WORDS, "max_position_embeddings": 16, "max_image_length": -1},
        lambda: {**texts(), **images(12)},
    ),
    "ImageGPT": model(
        "ImageGPTForImageClassification",
        "ImageGPT",
        PIXELS,
        lambda: {"input_ids": classes(16), "labels": classes()},
    ),
    "Swin": classifier("Swin", SWIN),
    "Swin V2": classifier("Swinv2", SWIN),
    "ConvNeXt": classifier("ConvNext", CONVNEXT),
    "ConvNeXt V2": classifier("ConvNextV2", CONVNEXT),
    "ResNet": classifier("ResNet", {**STAGES, "embedding_size": 8}),
    "RegNet": classifier("RegNet", {**STAGES, "embedding_size": 8, "groups_width": 4}),
    "BiT": classifier("Bit", {**BIT, "global_padding": "same"}),
    "EfficientNet": classifier("EfficientNet", EFFICIENTNET),
    "MobileNetV2": classifier("MobileNetV2", MOBILENET, 32),
    "MobileViT": classifier("MobileViT", MOBILEVIT, 32),
    "PoolFormer": classifier("PoolFormer", POOLFORMER),
    "CvT": classifier("Cvt", CVT, 16, rows=True),
    "LeViT": classifier("Levit", LEVIT, 32, rows=True),
    "FocalNet": classifier("FocalNet", FOCAL),
    "PVT": classifier("Pvt", PVT, 16),
    "PVTv2": classifier("PvtV2", PVT, 16),
    "Hiera": classifier("Hiera", HIERA, 32),
    "SwiftFormer": classifier("SwiftFormer", SWIFT, 32),
    "SegFormer": model(
        "SegformerForSemanticSegmentation",
        "Segformer",
        SEGFORMER,
        lambda: {**images(16), "labels": classes(8, 8)},
    ),
    "DPT": model(
        "DPTForDepthEstimation",
        "DPT",
        DPT,
        lambda: {**images(12), "labels": numbers(32, 32)},
        task=VALUES,
        forward=depth,
    ),
    "YOLOS": model(
        "YolosForObjectDetection",
        "Yolos",
        {**VIT, "image_size": [12, 12], "num_detection_tokens": 3},
        lambda: objects(12),
        task=TOKENS,
    ),
    "DETR": model(
        "DetrForObjectDetection",
        "Detr",
        DETR,
        lambda: objects(32),
        task=TOKENS,
        forward=without_labels,
    ),
    "VideoMAE": video("VideoMAE", VIDEO),
    "TimeSformer": video("Timesformer", VIDEO),
    "ViViT": video("Vivit", {**VIDEO, "tubelet_size": [2, 6, 6]}),
}
