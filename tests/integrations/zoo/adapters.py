"""Adapters of PEFT: they alone are protected."""

from typing import Any

from torch import Tensor, nn

from tests.integrations.zoo.decoders import LLAMA, checkpointed
from tests.integrations.zoo.encoders import BERT
from tests.integrations.zoo.entry import Entry
from tests.integrations.zoo.translators import SMALL_T5
from tests.integrations.zoo.vision import CONVNEXT, classifier

BOTH = {"target_modules": ["q_proj", "v_proj"]}
ONE = {"target_modules": ["q_proj"]}  # layers that share a basis have one shape
LANGUAGE = {"task_type": "CAUSAL_LM"}
VIRTUAL = {**LANGUAGE, "num_virtual_tokens": 3}


def adapted(kind: str, options: dict[str, Any], entry: Entry = LLAMA, **fields: Any) -> Entry:
    """A model with an adapter.

    Args:
        kind: The beginning of the name of its configuration.
        options: Of its configuration.
        entry: Has the model.
        fields: Of the entry.
    """

    def change(model: nn.Module) -> nn.Module:
        import peft

        wrapped: nn.Module = peft.get_peft_model(model, getattr(peft, f"{kind}Config")(**options))
        return wrapped

    return entry.changed(change, library="peft", **fields)


def behind_prompt(model: nn.Module, batch: Any) -> Tensor:
    """The outputs of the text, without those of the virtual tokens before it."""
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits: Tensor = outputs.logits[:, VIRTUAL["num_virtual_tokens"] :]
    return logits


ENTRIES: dict[str, Entry] = {
    "LoRA": adapted("Lora", {**BOTH, "r": 4}),
    "LoRA, checkpointed": adapted("Lora", {**BOTH, "r": 4}, checkpointed(LLAMA)),
    "LoRA, embeddings": adapted(
        "Lora", {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "r": 4}
    ),
    "LoRA, classifier": adapted(
        "Lora", {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 4}, BERT
    ),
    "LoRA, convolutions": adapted(
        "Lora",
        {"target_modules": ["dwconv", "pwconv1"], "r": 24, "modules_to_save": ["classifier"]},
        classifier("ConvNext", CONVNEXT),
    ),
    "LoRA, T5": adapted("Lora", {"target_modules": ["q", "v"], "r": 4}, SMALL_T5),
    "rsLoRA": adapted("Lora", {**BOTH, "r": 4, "use_rslora": True}),
    "DoRA": adapted("Lora", {**BOTH, "r": 4, "use_dora": True}),
    "AdaLoRA": adapted(
        "AdaLora", {**BOTH, "total_step": 10, "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1}
    ),
    "LoHa": adapted("LoHa", {**BOTH, "r": 4}),
    "LoKr": adapted("LoKr", {**BOTH, "r": 4}),
    "VeRA": adapted("Vera", {**ONE, "r": 4}),
    "RandLoRA": adapted("RandLora", {**ONE, "r": 4}),
    "VB-LoRA": adapted("VBLoRA", {**BOTH, "r": 4, "num_vectors": 8, "vector_length": 4}),
    "FourierFT": adapted("FourierFT", {**BOTH, "n_frequency": 10}),
    "IA3": adapted(
        "IA3",
        {
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
    ),
    "OFT": adapted("OFT", {**BOTH, "oft_block_size": 4}),
    "BOFT": adapted("BOFT", {**BOTH, "boft_block_size": 4}),
    "HRA": adapted("HRA", {**BOTH, "r": 4}),
    "MiSS": adapted("Miss", {**BOTH, "r": 4}),
    "tuned norms": adapted("LNTuning", {"target_modules": ["input_layernorm"]}),
    "prompt tuning": adapted("PromptTuning", VIRTUAL, forward=behind_prompt),
    "P-tuning": adapted(
        "PromptEncoder", {**VIRTUAL, "encoder_hidden_size": 8}, forward=behind_prompt
    ),
    "prefix tuning": adapted("PrefixTuning", VIRTUAL),
    "prefix tuning, projected": adapted(
        "PrefixTuning", {**VIRTUAL, "prefix_projection": True, "encoder_hidden_size": 8}
    ),
    "LLaMA-Adapter": adapted("AdaptionPrompt", {**LANGUAGE, "adapter_len": 3, "adapter_layers": 1}),
}
