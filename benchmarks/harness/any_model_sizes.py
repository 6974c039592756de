"""Sizes that small models of some families need beside the usual ones, in all parts of their configurations."""

from __future__ import annotations

from typing import Any

PATCH, SIDE = 8, 32
PATCHES = (SIDE // PATCH) ** 2

ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
GRID_VISION = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
GRID_TOKENS = {"vision_start_token_id": 98, "vision_end_token_id": 99, "video_token_id": 97}
QWEN_VL = {**GRID_TOKENS, "text_config": {"rope_parameters": ROTARY}}
QWEN3_VISION = {
    **GRID_VISION,
    "out_hidden_size": 32,
    "num_position_embeddings": PATCHES,
    "deepstack_visual_indexes": [0],
}
QWEN2_5_VL = QWEN_VL | {
    "vision_config": {**GRID_VISION, "out_hidden_size": 32, "window_size": SIDE, "fullatt_block_indexes": [1]}
}
QWEN3_5 = {
    **GRID_TOKENS,
    "vision_config": QWEN3_VISION,
    "text_config": {"layer_types": ["linear_attention", "full_attention"]},
}
BINS = {"feature_projection_input_dim": 16}
GLM_VL = QWEN_VL | {"vision_config": {**GRID_VISION, "out_hidden_size": 32}}
HALF_ROTARY = {**ROTARY, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
GLM_OCR = GLM_VL | {"text_config": {"rope_parameters": HALF_ROTARY}}
CONVNEXT = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}
PYRAMID = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 32], "num_attention_heads": [1, 2, 4, 4]}
TILES = 4

SIZES: dict[str, dict[str, Any]] = {
    "blip-2": {"num_query_tokens": 4, "qformer_config": {"num_hidden_layers": 2}},
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640, "image_size": 64},
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"block_sizes": [1, 1], "d_head": 8, "d_inner": 64},
    "gemma3": {"mm_tokens_per_image": 4, "boi_token_index": 98, "eoi_token_index": 99},
    "florence2": {
        "vision_config": {
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "window_size": 4,
            "max_position_embeddings": 16,
        }
    },
    **dict.fromkeys(("glm4v", "glm46v"), GLM_VL),
    **dict.fromkeys(("glm4v_moe", "glm_ocr"), GLM_OCR),
    "instructblip": {"num_query_tokens": 4},
    "idefics2": {
        "perceiver_config": {
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        }
    },
    "kosmos-2": {"latent_query_num": 4},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": SIDE},
    "levit": {
        "hidden_sizes": [32, 32, 32],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "patch_size": 16,
        "image_size": 64,
    },
    "lilt": {"hidden_size": 48},
    "llama4": {
        "vision_config": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "llava_next": {"image_grid_pinpoints": [[SIDE, SIDE]]},
    "llava_onevision": {"image_grid_pinpoints": [[SIDE, SIDE]]},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    "mllama": {
        "vision_config": {
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "max_num_tiles": TILES,
        },
        "text_config": {"cross_attention_layers": [1], "num_hidden_layers": 3},
    },
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "pvt": PYRAMID,
    "pvt_v2": PYRAMID,
    **dict.fromkeys(("qwen2_5_vl", "exaone4_5"), QWEN2_5_VL),
    "qwen2_vl": QWEN_VL | {"vision_config": GRID_VISION},
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), QWEN_VL | {"vision_config": QWEN3_VISION}),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), QWEN3_5),
    **dict.fromkeys(("wav2vec2-bert", "seamless_m4t", "seamless_m4t_v2"), BINS),
    "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 32},
    "reformer": {"is_decoder": False},
    "shieldgemma2": {
        "mm_tokens_per_image": 4,
        "boi_token_index": 98,
        "eoi_token_index": 99,
        "yes_token_index": 5,
        "no_token_index": 6,
    },
}
"""Changes by ``model_type``; a dictionary changes a part of the configuration."""

UNSET_SIZES = {"funnel": {"num_hidden_layers"}, "levit": {"embed_dim"}}
"""Usual sizes that some configurations refuse."""


def with_own_sizes(name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes with those that a family needs, part by part."""
    found = {key: value for key, value in sizes.items() if key not in UNSET_SIZES.get(name, ())}
    for key, value in SIZES.get(name, {}).items():
        inside = found.get(key)
        found[key] = {**inside, **value} if isinstance(value, dict) and isinstance(inside, dict) else value
    return found
