"""Models of Hugging Face's transformers, tiny and random: equal to one sample at a time.

Their batches are mappings with labels and padding, their models leave out masks that mask nothing
(a branch on values), and their weights are tied: what a plain network does not have.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc import EWC, Classification, OnlineEWC, TimeSeries
from tests import oracle
from tests.support.asserts import assert_close

transformers = pytest.importorskip("transformers")

SAMPLES, LENGTH, WORDS, CLASSES = 6, 7, 40, 3
ATTENTION = ["sdpa", "eager"]


def shift(labels: Tensor) -> Tensor:
    """The target of a position is the next token; the last one has none."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


LANGUAGE = TimeSeries(Classification(target_transform=shift), batch_first=True)

SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}

LANGUAGE_MODELS: dict[str, Callable[[str], nn.Module]] = {
    "gpt2": lambda attention: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            attn_implementation=attention,
        )
    ),
    "llama": lambda attention: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**GROUPED, attn_implementation=attention)
    ),
    "qwen2": lambda attention: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True, attn_implementation=attention)
    ),
    "mistral": lambda attention: transformers.MistralForCausalLM(
        transformers.MistralConfig(**GROUPED, attn_implementation=attention)
    ),
    "gemma": lambda attention: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**GROUPED, head_dim=4, attn_implementation=attention)
    ),
    "neox": lambda attention: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**SMALL, attn_implementation=attention)
    ),
}

CLASSIFIERS: dict[str, Callable[[str], nn.Module]] = {
    "bert": lambda attention: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, num_labels=CLASSES, attn_implementation=attention)
    ),
    "distilbert": lambda attention: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=WORDS,
            dim=16,
            hidden_dim=24,
            n_layers=2,
            n_heads=2,
            max_position_embeddings=16,
            num_labels=CLASSES,
            attn_implementation=attention,
        )
    ),
    "gpt2": lambda attention: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(
            vocab_size=WORDS,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            pad_token_id=0,
            num_labels=CLASSES,
            attn_implementation=attention,
        )
    ),
}

VISION: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=12,
            patch_size=6,
            num_labels=CLASSES,
        )
    ),
    "swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=12,
            patch_size=2,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=3,
            num_labels=CLASSES,
        )
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=CLASSES
        )
    ),
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(
            hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2, num_labels=CLASSES
        )
    ),
}

TRANSLATORS: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=WORDS,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """In float64, with weights large enough to matter, dropout and batch norms in train mode."""
    torch.manual_seed(0)
    model = make().double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    return model


def text() -> dict[str, Tensor]:
    """Two texts of full length first, so that a mask is needed only later."""
    torch.manual_seed(1)
    lengths = torch.tensor([7, 7, 4, 6, 7, 3])
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
    return {"input_ids": torch.randint(1, WORDS, (SAMPLES, LENGTH)) * mask, "attention_mask": mask}


def batches(data: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{key: value[part] for key, value in data.items()} for part in (slice(4), slice(4, 6))]


def check(
    model: nn.Module,
    data: dict[str, Tensor],
    likelihood: Any,
    nll: Callable[[Any, Tensor], Tensor],
    tolerance: float = 1e-9,
) -> None:
    """Equal to the oracle with `nll(model's outputs, labels) -> []`; every parameter by rule."""
    ewc = EWC(model, likelihood)
    summary = ewc.consolidate(batches(data))

    def losses(model: nn.Module, n: int) -> Tensor:
        sample = oracle.one(data, n)
        labels = sample.pop("labels")
        return nll(model(**sample), labels).reshape(1)

    expected = oracle.squares(model, losses, SAMPLES)
    assert_close(ewc.fisher, {name: each / SAMPLES for name, each in expected.items()}, tolerance)
    assert set(summary.paths.values()) == {"rule"}, summary.paths


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models(name: str, attention: str) -> None:
    data = text()
    data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)

    def nll(outputs: Any, labels: Tensor) -> Tensor:
        logits, targets = outputs.logits[0, :-1], labels[0, 1:]
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")

    check(build(lambda: LANGUAGE_MODELS[name](attention)), data, LANGUAGE, nll)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_loss_of_the_language_model_itself(name: str) -> None:
    data = text()
    data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    model = build(lambda: LANGUAGE_MODELS[name]("sdpa"))
    ewc = EWC(model, LANGUAGE)
    ewc.consolidate(batches(data))

    def losses(model: nn.Module, n: int) -> Tensor:
        sample = oracle.one(data, n)
        predicted = (sample["labels"][:, 1:] != -100).sum()
        return (model(**sample).loss * predicted).reshape(1)  # a mean over tokens, in float32

    expected = oracle.squares(model, losses, SAMPLES)
    assert_close(ewc.fisher, {name: each / SAMPLES for name, each in expected.items()}, 1e-5)


def test_tied_embeddings_are_one_parameter() -> None:
    model = build(lambda: LANGUAGE_MODELS["gpt2"]("sdpa"))
    assert model.lm_head.weight is model.transformer.wte.weight
    data = {**text(), "labels": text()["input_ids"]}
    ewc = OnlineEWC(model, LANGUAGE, parameters=["lm_head.weight"])
    ewc.consolidate([data])
    assert list(ewc.fisher) == ["transformer.wte.weight"]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_text_classifiers(name: str, attention: str) -> None:
    data = {**text(), "labels": torch.randint(CLASSES, (SAMPLES,))}

    def nll(outputs: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, labels)

    check(build(lambda: CLASSIFIERS[name](attention)), data, Classification(), nll)


@pytest.mark.parametrize("name", VISION)
def test_image_classifiers(name: str) -> None:
    torch.manual_seed(2)
    images = torch.randn(SAMPLES, 3, 12, 12).double()
    data = {"pixel_values": images, "labels": torch.randint(CLASSES, (SAMPLES,))}

    def nll(outputs: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, labels)

    check(build(VISION[name]), data, Classification(), nll)


@pytest.mark.parametrize("name", TRANSLATORS)
def test_translators(name: str) -> None:
    data = text()
    data["decoder_input_ids"] = torch.randint(1, WORDS, (SAMPLES, 4))
    data["labels"] = data["decoder_input_ids"].clone()
    data["labels"][1, 2:] = -100

    def nll(outputs: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits[0], labels[0], ignore_index=-100, reduction="sum")

    check(build(TRANSLATORS[name]), data, TimeSeries(batch_first=True), nll)


def test_a_tokenizers_batch_is_a_mapping() -> None:
    model = build(lambda: CLASSIFIERS["bert"]("sdpa"))
    data = {**text(), "labels": torch.randint(CLASSES, (SAMPLES,))}
    as_dict, as_encoding = EWC(model, Classification()), EWC(model, Classification())
    as_dict.consolidate([data])
    as_encoding.consolidate([transformers.BatchEncoding(data)])
    assert_close(as_encoding.fisher, as_dict.fisher, 1e-12)


def test_the_hint_for_language_models_says_what_to_write() -> None:
    model = build(lambda: LANGUAGE_MODELS["gpt2"]("sdpa"))
    data = {**text(), "labels": text()["input_ids"]}
    with pytest.raises(ValueError, match=r"TimeSeries\(.*batch_first=True"):
        EWC(model, Classification(target_transform=shift)).consolidate([data])
