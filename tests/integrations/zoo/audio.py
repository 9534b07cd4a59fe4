"""Models of sound that classify it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.integrations.zoo.data import CLASSES, classes, masked_sounds, numbers, sounds
from tests.integrations.zoo.entry import Entry
from tests.integrations.zoo.task import CLASS

WAVE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8],
    "conv_kernel": [4, 3],
    "conv_stride": [3, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "vocab_size": 10,
}
LAYER = {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
SQUEEZED = {**WAVE, "squeeze_factor": 2}
CONFORMER = {**WAVE, "conv_depthwise_kernel_size": 3}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 6,
    "classifier_proj_size": 8,
}
SPECTROGRAM = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 4,
    "max_length": 12,
    "num_mel_bins": 8,
    "frequency_stride": 4,
    "time_stride": 4,
}


def features(name: str, *shape: int) -> Callable[[], dict[str, Tensor]]:
    """Features under this name, and a class for each."""
    return lambda: {name: numbers(*shape), "labels": classes()}


def classifier(
    kind: str,
    options: dict[str, Any],
    data: Callable[[], dict[str, Tensor]] = sounds,
    **entry: Any,
) -> Entry:
    """A class for a sound.

    Args:
        kind: The beginning of the name of its configuration.
        options: Of its configuration.
        data: Makes sounds with classes.
        entry: Fields of the entry.
    """

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**options, num_labels=CLASSES)
        model: nn.Module = transformers.AutoModelForAudioClassification.from_config(config)
        return model

    return Entry("transformers", make, data, CLASS, **entry)


ENTRIES: dict[str, Entry] = {
    "Wav2Vec2": classifier("Wav2Vec2", WAVE),
    "Wav2Vec2, masked": classifier("Wav2Vec2", LAYER, masked_sounds),
    "HuBERT": classifier("Hubert", WAVE),
    "HuBERT, masked": classifier("Hubert", LAYER, masked_sounds),
    "WavLM": classifier("WavLM", WAVE),
    "WavLM, masked": classifier("WavLM", LAYER, masked_sounds),
    "UniSpeech": classifier("UniSpeech", {**WAVE, "num_ctc_classes": 10}),
    "SEW": classifier("SEW", SQUEEZED),
    "SEW-D": classifier("SEWD", {**SQUEEZED, "position_buckets": 4, "max_position_embeddings": 16}),
    "Data2Vec, audio": classifier(
        "Data2VecAudio", {**WAVE, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}
    ),
    "Wav2Vec2-Conformer": classifier("Wav2Vec2Conformer", CONFORMER),
    "Wav2Vec2-BERT": classifier(
        "Wav2Vec2Bert",
        {**CONFORMER, "feature_projection_input_dim": 8},
        features("input_features", 9, 8),
    ),
    "AST": classifier("AST", SPECTROGRAM, features("input_values", 12, 8)),
    "Whisper, classifier": classifier("Whisper", WHISPER, features("input_features", 8, 12)),
}
