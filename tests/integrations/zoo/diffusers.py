"""Denoisers and autoencoders of diffusers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.integrations.zoo.data import SAMPLES, classes, numbers
from tests.integrations.zoo.entry import Entry
from tests.integrations.zoo.task import VALUES

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CROSS: dict[str, Any] = {
    **UNET,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 8,
}
LINE: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"),
    "up_block_types": ("UpResnetBlock1D",),
    "mid_block_type": "MidResTemporalBlock1D",
    "out_block_type": "OutConv1DBlock",
    "time_embedding_type": "positional",
    "use_timestep_embedding": True,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "act_fn": "mish",
}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
PATCHES: dict[str, Any] = {
    **HEADS,
    "in_channels": 3,
    "out_channels": 3,
    "sample_size": 8,
    "patch_size": 2,
    "norm_num_groups": 4,
}
SD3: dict[str, Any] = {
    **HEADS,
    "in_channels": 3,
    "out_channels": 3,
    "sample_size": 8,
    "patch_size": 2,
    "joint_attention_dim": 8,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 8,
}
KL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "latent_channels": 2,
}


def model(
    kind: str, options: dict[str, Any], inputs: Callable[[], dict[str, Tensor]], *shape: int
) -> Entry:
    """A model that predicts numbers, `[SAMPLES, *shape]`."""

    def make() -> nn.Module:
        import diffusers

        made: nn.Module = getattr(diffusers, kind)(**options)
        return made

    def forward(denoiser: nn.Module, batch: Any) -> Tensor:
        outputs: Tensor = denoiser(**batch[0], return_dict=False)[0]
        return outputs

    return Entry("diffusers", make, lambda: (inputs(), numbers(*shape)), VALUES, forward)


def denoiser(kind: str, options: dict[str, Any], *extra: str, noisy: str = "sample") -> Entry:
    """From a noisy image, a time and more to the noise.

    Args:
        kind: The class.
        options: Of the model.
        extra: Names of further inputs.
        noisy: Name of the image.
    """

    def inputs() -> dict[str, Tensor]:
        known = {
            "class_labels": classes(),
            "encoder_hidden_states": numbers(5, 8),
            "pooled_projections": numbers(8),
        }
        given = {name: known[name] for name in extra}
        return {noisy: numbers(3, 8, 8), "timestep": times(), **given}

    return model(kind, options, inputs, 3, 8, 8)


def times() -> Tensor:
    return torch.arange(SAMPLES) * 10 + 3


def checkpointed(entry: Entry) -> Entry:
    """With the activations of each block computed twice."""

    def change(made: Any) -> None:
        made.enable_gradient_checkpointing()

    return entry.changed(change)


PROMPTED = denoiser("UNet2DConditionModel", CROSS, "encoder_hidden_states")
DIT = denoiser(
    "DiTTransformer2DModel",
    {**PATCHES, "num_embeds_ada_norm": 10},
    "class_labels",
    noisy="hidden_states",
)

ENTRIES: dict[str, Entry] = {
    "UNet": denoiser("UNet2DModel", UNET),
    "UNet, classes": denoiser("UNet2DModel", {**UNET, "num_class_embeds": 3}, "class_labels"),
    "UNet, prompts": PROMPTED,
    "UNet, prompts, checkpointed": checkpointed(PROMPTED),
    "UNet, one dimension": model(
        "UNet1DModel", LINE, lambda: {"sample": numbers(3, 16), "timestep": times()}, 3, 16
    ),
    "DiT": DIT,
    "DiT, checkpointed": checkpointed(DIT),
    "PixArt": denoiser(
        "PixArtTransformer2DModel",
        {
            **PATCHES,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "use_additional_conditions": False,
        },
        "encoder_hidden_states",
        noisy="hidden_states",
    ),
    "Stable Diffusion 3": denoiser(
        "SD3Transformer2DModel",
        SD3,
        "encoder_hidden_states",
        "pooled_projections",
        noisy="hidden_states",
    ),
    "autoencoder": model("AutoencoderKL", KL, lambda: {"sample": numbers(3, 8, 8)}, 3, 8, 8),
    "autoencoder, quantised": model(
        "VQModel",
        {**KL, "num_vq_embeddings": 8},
        lambda: {"sample": numbers(3, 8, 8)},
        3,
        8,
        8,
    ),
}
