"""Encoder-decoders, from text or sound to text."""

from typing import Any

from torch import Tensor, nn

from tests.integrations.zoo.data import LENGTH, WORDS, answers, numbers, texts
from tests.integrations.zoo.decoders import TEXT, checkpointed
from tests.integrations.zoo.entry import Entry
from tests.integrations.zoo.task import TOKENS

BART = {
    **TEXT,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 2,
}
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
SPARSE = {
    "num_decoder_layers": 1,
    "num_experts": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}
NLLB = {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
POSITIONS = {"max_source_positions": 6, "max_target_positions": 16}
GLOBAL = {"encoder_attention_type": "transient-global", "global_block_size": 2}


def translator(kind: str, options: dict[str, Any], length: int = LENGTH, **entry: Any) -> Entry:
    """From text to text.

    Args:
        kind: The beginning of the name of its configuration.
        options: Of its configuration.
        length: Of the texts.
        entry: Fields of the entry.
    """

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**options)
        model: nn.Module = transformers.AutoModelForSeq2SeqLM.from_config(config)
        return model

    return Entry("transformers", make, lambda: {**texts(length), **answers()}, TOKENS, **entry)


def listener(kind: str, options: dict[str, Any], *shape: int) -> Entry:
    """From features of sound, `[SAMPLES, *shape]`, to text."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**options)
        model: nn.Module = transformers.AutoModelForSpeechSeq2Seq.from_config(config)
        return model

    def data() -> dict[str, Tensor]:
        return {"input_features": numbers(*shape), **answers()}

    return Entry("transformers", make, data, TOKENS)


SMALL_T5 = translator("T5", T5)

ENTRIES: dict[str, Entry] = {
    "T5": SMALL_T5,
    "T5, checkpointed": checkpointed(SMALL_T5),
    "T5, gated": translator(
        "T5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ),
    "UMT5": translator("UMT5", T5),
    "LongT5": translator("LongT5", {**T5, "local_radius": 3, **GLOBAL}),
    # Routers are in float32.
    "Switch Transformer": translator("SwitchTransformers", {**T5, **SPARSE}, tolerance=1e-6),
    "BART": translator("Bart", BART),
    "mBART": translator("MBart", BART),
    "Marian": translator("Marian", BART),
    "Pegasus": translator("Pegasus", BART),
    "PEGASUS-X": translator("PegasusX", {**BART, "block_size": 4, "num_global_tokens": 2}, 8),
    "Blenderbot": translator("Blenderbot", BART),
    "M2M100": translator("M2M100", BART),
    "NLLB-MoE": translator("NllbMoe", {**BART, **NLLB}, tolerance=1e-6),
    "FSMT": translator(
        "FSMT",
        {**BART, "langs": ["a", "b"], "src_vocab_size": WORDS, "tgt_vocab_size": WORDS},
    ),
    "Whisper": listener("Whisper", {**BART, **POSITIONS, "num_mel_bins": 8}, 8, 12),
    "Speech2Text": listener(
        "Speech2Text",
        {**BART, **POSITIONS, "input_feat_per_channel": 12, "conv_channels": 16},
        8,
        12,
    ),
}
