"""Small random models of transformers' causal decoders.

A configuration is transformers' own with small sizes in place, in its parts (text, vision, audio) too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

WIDTH = dict.fromkeys(
    ("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "hidden_size_global"), 32
)
INNER = dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 64)
DEPTH = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2)
HEADS = dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4)
LATENT = dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16) | dict.fromkeys(
    ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8
)
EXPERTS = (
    dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16)
    | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
)
RECURRENT = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "mamba_d_head"), 8) | {
    "state_size": 8,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
}
TEXT = {"vocab_size": 101, "max_position_embeddings": 64, "n_positions": 64, "sliding_window": 8}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {**WIDTH, **INNER, **DEPTH, **HEADS, **LATENT, **EXPERTS, **RECURRENT, **TEXT, **TOKENS}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8}

PER_LAYER = {"vocab_size_per_layer_input": 101, "hidden_size_per_layer_input": 8}
GEMMA4 = {**PER_LAYER, "global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_target_positions": 64}

OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "logit_scale": 1.0,
        "rope_parameters": {"full_attention": {**ROPE, "mrope_section": [2, 1, 1]}},
    },
    "dbrx": {
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 8,
        "shared_experts_intermediate_size": 16,
        "layer_types": ["indexed_attention", "full_attention"],
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
        "mlp_layer_types": ["dense", "dense"],
        "per_layer_config": {},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {**PER_LAYER, "laurel_rank": 8, "num_kv_shared_layers": 0},
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        "num_key_value_heads": 4,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minicpm3": {"num_key_value_heads": 4},
    "plbart": DECODER,
    "prophetnet": {
        "num_decoder_layers": 2,
        "num_encoder_layers": 2,
        "num_decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "feed_forward_size": 64,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
    },
    "whisper": DECODER,
    "xmod": {"default_language": "en_XX", "num_attention_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""Sizes that some kinds of configurations need in addition, by their ``model_type``."""

UNSET = {"xlnet": {"max_position_embeddings"}, "prophetnet": set(DEPTH), "gpt_neo": {"n_layer"}}
"""Sizes that some kinds of configurations refuse."""

DEEP = dict.fromkeys(DEPTH, 8) | {"attn_layer_period": 2, "attn_layer_offset": 1}
TRIED: tuple[tuple[frozenset[str], dict[str, int]], ...] = (
    (frozenset(), {}),
    (frozenset({"head_dim"}), {}),
    (frozenset(), DEEP),
    (frozenset({"head_dim"}), DEEP),
    (frozenset({"head_dim", "num_key_value_heads", *HEADS}), {}),
    (frozenset({"head_dim", *LATENT}), {}),
)
"""Sets of small sizes, one tried after the other: what is left as the family has it, and what is changed."""

MOST_PARAMETERS = 80_000_000


@dataclass(frozen=True)
class NotMade:
    """Why no small model of a family was made: the last error, or the number of parameters of the smallest."""

    reason: str


def small_model(name: str, ids: torch.Tensor) -> PreTrainedModel | NotMade:
    """A small random model that runs on ``ids`` [n_sequences, length]."""
    reason = ""
    for kept, changed in TRIED:
        try:
            known = AutoConfig.for_model(name)
            config = AutoConfig.for_model(name, **small_sizes(known, kept, changed))
            with torch.device("meta"):
                parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if parameters > MOST_PARAMETERS:
                reason = reason or f"{parameters:,} parameters"
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {error}"
            continue
        return model
    return NotMade(reason)


def small_sizes(config: PreTrainedConfig, kept: frozenset[str], changed: dict[str, int]) -> dict[str, Any]:
    """Small sizes for a configuration and, as dictionaries, for those inside it."""
    kept = kept | UNSET.get(config.model_type, set())
    known = [key for key in {**SMALL, **changed} if key not in kept and _has(config, key)]
    sizes: dict[str, Any] = {key: {**SMALL, **changed}[key] for key in known}
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            sizes[key] = {**small_sizes(part, kept, changed), "model_type": part.model_type}
    return sizes | OWN.get(config.model_type, {})


def _has(config: PreTrainedConfig, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:  # transformers' way to say that its layers differ in it
        return True
