"""Encoders of text that classify it, or each of its tokens."""

from typing import Any

from torch import nn

from tests.integrations.zoo.data import CLASSES, LENGTH, WORDS, classes, labelled_texts, texts
from tests.integrations.zoo.decoders import TEXT, checkpointed
from tests.integrations.zoo.entry import Entry
from tests.integrations.zoo.task import CLASS, TOKENS

PAIR = {**TEXT, "type_vocab_size": 2}
NARROW = {**PAIR, "embedding_size": 8}
RELATIVE = {**PAIR, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
XL = {"vocab_size": WORDS, "d_model": 16, "n_head": 2, "d_inner": 24, "pad_token_id": 0}
XLM = {**TEXT, "emb_dim": 16, "n_layers": 2, "n_heads": 2}
SQUEEZED = ("q", "k", "v", "post_attention", "intermediate", "output")


def classifier(kind: str, options: dict[str, Any], length: int = LENGTH, **entry: Any) -> Entry:
    """A class for a text.

    Args:
        kind: The beginning of the names of model and configuration.
        options: Of its configuration.
        length: Of the texts.
        entry: Fields of the entry.
    """

    def make() -> nn.Module:
        return _model(f"{kind}ForSequenceClassification", kind, options)

    return Entry("transformers", make, lambda: labelled_texts(length), CLASS, **entry)


def tagger(kind: str, options: dict[str, Any]) -> Entry:
    """A class for each token."""

    def make() -> nn.Module:
        return _model(f"{kind}ForTokenClassification", kind, options)

    def data() -> dict[str, Any]:
        return {**texts(), "labels": classes(LENGTH)}

    return Entry("transformers", make, data, TOKENS)


def _model(name: str, kind: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**options, num_labels=CLASSES)
    model: nn.Module = getattr(transformers, name)(config)
    return model


BERT = classifier("Bert", PAIR)

ENTRIES: dict[str, Entry] = {
    "BERT": BERT,
    "BERT, checkpointed": checkpointed(BERT),
    "BERT, tagger": tagger("Bert", PAIR),
    "RoBERTa": classifier("Roberta", PAIR),
    "XLM-RoBERTa": classifier("XLMRoberta", PAIR),
    "DistilBERT": classifier("DistilBert", {**TEXT, "dim": 16, "hidden_dim": 24, "n_layers": 2}),
    "ALBERT": classifier("Albert", NARROW),
    "ELECTRA": classifier("Electra", NARROW),
    "DeBERTa": classifier("Deberta", RELATIVE),
    "DeBERTa-v2": classifier("DebertaV2", {**RELATIVE, "conv_kernel_size": 3}),
    "MPNet": classifier("MPNet", PAIR),
    "ModernBERT": classifier(
        "ModernBert", {**TEXT, "local_attention": 4, "global_attn_every_n_layers": 2}
    ),
    "RoFormer": classifier("RoFormer", NARROW),
    "ConvBERT": classifier("ConvBert", {**NARROW, "head_ratio": 1, "conv_kernel_size": 3}),
    "SqueezeBERT": classifier(
        "SqueezeBert",
        {**PAIR, "embedding_size": 16, **{f"{part}_groups": 2 for part in SQUEEZED}},
    ),
    "MobileBERT": classifier(
        "MobileBert", {**NARROW, "intra_bottleneck_size": 8, "true_hidden_size": 8}
    ),
    "FNet": classifier("FNet", PAIR),
    "Longformer": classifier("Longformer", {**PAIR, "attention_window": 4}, 8),
    "BigBird": classifier("BigBird", {**PAIR, "attention_type": "original_full"}),
    "Funnel": classifier("Funnel", {**XL, "block_sizes": [1, 1], "d_head": 8}),
    "XLNet": classifier("XLNet", {**XL, "n_layer": 2}),
    "XLM": classifier("XLM", XLM),
    "ESM": classifier("Esm", {**TEXT, "position_embedding_type": "rotary", "mask_token_id": 3}),
    "LUKE": classifier("Luke", {**PAIR, "entity_vocab_size": 10}),
    "GPT-2, classifier": classifier("GPT2", TEXT),
    "Llama, classifier": classifier("Llama", TEXT),
}
