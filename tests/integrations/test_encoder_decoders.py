"""Encoder-decoders of Hugging Face's transformers: equal to their own loss of one sample.

They make the inputs of their decoder from the labels, which a model that predicts labels is
otherwise not called with.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc import EWC, Classification, TimeSeries
from tests import oracle
from tests.support.asserts import assert_close

transformers = pytest.importorskip("transformers")

SAMPLES, LENGTH, WORDS = 4, 6, 37

SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}
T5: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BERT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def joined_berts() -> nn.Module:
    parts = (transformers.BertConfig(**BERT), transformers.BertConfig(**BERT))
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        *parts, decoder_start_token_id=2, pad_token_id=1
    )
    return transformers.EncoderDecoderModel(config=config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL)),
    "mbart": lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**SMALL)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "marian": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(**SMALL, decoder_vocab_size=WORDS)
    ),
    "pegasus": lambda: transformers.PegasusForConditionalGeneration(
        transformers.PegasusConfig(**SMALL)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **SMALL, num_mel_bins=4, max_source_positions=10, max_target_positions=16
        )
    ),
    "two berts": joined_berts,
}


@pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # of transformers, about its own loss
    "ignore::ewc.ZeroFisherWarning",  # of poolers, which nothing reads
)
@pytest.mark.parametrize("name", MODELS)
def test_the_fisher_is_that_of_the_models_own_loss(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    labels = torch.randint(3, WORDS, (SAMPLES, LENGTH))
    labels[0, 4:] = labels[2, 2:] = -100
    inputs = {"input_ids": torch.randint(3, WORDS, (SAMPLES, LENGTH))}
    if name == "whisper":
        inputs = {"input_features": torch.randn(SAMPLES, 4, 20, dtype=torch.float64)}
    batch = {**inputs, "labels": labels}

    def losses(model: nn.Module, n: int) -> Tensor:
        one = {key: value[n : n + 1] for key, value in batch.items()}
        return model(**one).loss[None] * (one["labels"] != -100).sum()  # it is a mean over tokens

    ewc = EWC(model, TimeSeries(Classification(), batch_first=True))
    summary = ewc.consolidate([batch])
    expected = oracle.squares(model, losses, SAMPLES)
    expected = {name: each / SAMPLES for name, each in expected.items()}
    # The softmax makes the gradients of keys' biases zero: their squares are rounding alone.
    keys = {name for name in expected if name.endswith("k_proj.bias")}
    top = max(each.max() for each in expected.values())
    assert all(ewc.fisher[name].max() < 1e-24 * top for name in keys)
    found = {name: each for name, each in ewc.fisher.items() if name not in keys}
    assert_close(found, {name: expected[name] for name in found}, 1e-12)
    assert set(summary.paths.values()) <= {"rule", "unused"}
