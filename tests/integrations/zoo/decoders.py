"""Language models that predict the next token."""

from typing import Any

import torch
from torch import nn

from tests.integrations.zoo.data import WORDS, language
from tests.integrations.zoo.entry import Entry
from tests.integrations.zoo.task import NEXT_TOKENS

TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
LOCAL = {**GROUPED, "sliding_window": 4}
EXPERTS = {**LOCAL, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN2_MOE = {**EXPERTS, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
DEEPSEEK = {
    **TEXT,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MAMBA_2 = {"state_size": 4, "head_dim": 8, "num_heads": 4, "n_groups": 1, "chunk_size": 4}
GRIFFIN = {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 4}


def decoder(kind: str, options: dict[str, Any], experts: str = "", **entry: Any) -> Entry:
    """A causal language model.

    Args:
        kind: The beginning of the name of its configuration.
        options: Of its configuration.
        experts: How its experts are computed.
        entry: Fields of the entry.
    """

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**options)
        how = {"experts_implementation": experts} if experts else {}
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, **how)
        return model

    return Entry("transformers", make, language, NEXT_TOKENS, **entry)


def checkpointed(entry: Entry, *, reentrant: bool = False) -> Entry:
    """With the activations of each block computed twice, as transformers' trainer asks for it."""

    def change(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    return entry.changed(change)


GROUPS: dict[str, Any] = {
    "slow": {
        f"model.layers.{layer}.mlp.experts.{name}": "vmap"
        for layer in range(2)
        for name in ("gate_up_proj", "down_proj")
    },
    "reason": "no rule for the product of groups",
}

GPT2 = decoder("GPT2", TEXT)
LLAMA = decoder("Llama", GROUPED)
QWEN3 = decoder("Qwen3", GROUPED)

ENTRIES: dict[str, Entry] = {
    "GPT-2": GPT2,
    "GPT-2, bfloat16": decoder("GPT2", TEXT, dtype=torch.bfloat16, tolerance=0.1),
    "GPT-2, checkpointed": checkpointed(GPT2),
    "GPT-Neo": decoder(
        "GPTNeo",
        {**TEXT, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 3},
    ),
    "GPT-J": decoder("GPTJ", {**TEXT, "rotary_dim": 4}),
    "GPT-NeoX": decoder("GPTNeoX", TEXT),
    "OPT": decoder("OPT", {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "BLOOM": decoder("Bloom", TEXT),
    "Falcon": decoder("Falcon", TEXT),
    "Falcon, ALiBi": decoder("Falcon", {**TEXT, "alibi": True}),
    "MPT": decoder("Mpt", {"vocab_size": WORDS, "d_model": 16, "n_heads": 2, "n_layers": 2}),
    "Llama": LLAMA,
    "Llama, checkpointed": checkpointed(LLAMA),
    "Mistral": decoder("Mistral", LOCAL),
    "Qwen2": decoder("Qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "Qwen3": QWEN3,
    "Qwen3, checkpointed, reentrant": checkpointed(QWEN3, reentrant=True),
    "Gemma": decoder("Gemma", GROUPED),
    "Gemma 2": decoder("Gemma2", LOCAL),
    "Gemma 3": decoder("Gemma3Text", LOCAL),
    "Phi": decoder("Phi", TEXT),
    "Phi-3": decoder("Phi3", GROUPED),
    "StableLM": decoder("StableLm", GROUPED),
    "OLMo 2": decoder("Olmo2", GROUPED),
    "Cohere": decoder("Cohere", GROUPED),
    "Granite": decoder("Granite", GROUPED),
    "SmolLM3": decoder("SmolLM3", GROUPED),
    "BioGPT": decoder("BioGpt", TEXT),
    "CTRL": decoder("CTRL", {**TEXT, "dff": 24}),
    "Mixtral, eager": decoder("Mixtral", EXPERTS, "eager"),
    "Mixtral, batched": decoder("Mixtral", EXPERTS, "batched_mm"),
    # The product of groups has no float64.
    "Mixtral, grouped": decoder(
        "Mixtral", EXPERTS, "grouped_mm", dtype=torch.float32, tolerance=1e-4, **GROUPS
    ),
    "Qwen2-MoE": decoder("Qwen2Moe", QWEN2_MOE, "batched_mm"),
    # Its router is in float32.
    "DeepSeek-V2": decoder("DeepseekV2", DEEPSEEK, "batched_mm", tolerance=1e-6),
    "GPT-OSS": decoder("GptOss", EXPERTS, "batched_mm"),
    # Their recurrences, too.
    "Mamba": decoder("Mamba", {**TEXT, "state_size": 4, "time_step_rank": 3}, tolerance=1e-6),
    "Mamba-2": decoder("Mamba2", {**TEXT, **MAMBA_2}, tolerance=1e-6),
    "RecurrentGemma": decoder("RecurrentGemma", {**GROUPED, **GRIFFIN}),
}
