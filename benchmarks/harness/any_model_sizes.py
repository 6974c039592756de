"""Sizes that small models of some families need beside the usual ones, in all parts of their configurations."""

from __future__ import annotations

from typing import Any

from .any_model_parts import (
    BINS,
    CODEC,
    CONVNEXT,
    EFFICIENT,
    GEMMA4_VISION,
    GLM_OCR,
    GLM_VL,
    GRANITE_SPEECH,
    GRID_TOKENS,
    GRID_VISION,
    HALF_TURN,
    INKLING2,
    MINICPM,
    MUSE,
    OMNI,
    ONE_TILE,
    PATCH,
    PATCHES,
    PYRAMID,
    QUANTIZER,
    QWEN2_5_VL,
    QWEN3_5,
    QWEN3_LIKE,
    QWEN3_VISION,
    QWEN_VL,
    ROTARY,
    SAM,
    SIDE,
    TILES,
)

SIZES: dict[str, dict[str, Any]] = {
    "align": {
        "projection_dim": 160,
        "vision_config": {**EFFICIENT, "hidden_dim": 160, "image_size": 64, "initializer_range": 0.3},
    },
    "apertus1p5": {
        "image_token_offset": 20,
        "audio_token_offset": 28,
        "audio_config": {"codebook_dim": 32, "codebook_size": 8, "num_filters": 4, "upsampling_ratios": [2, 2]},
        "vision_config": {
            **QUANTIZER,
            "codebook_size": 8,
            "resolution": SIDE,
            "spatial_scale_factor": 8,
            "channel_multiplier": [1, 1, 1, 1],
        },
    },
    "aria": {
        "projector_patch_to_query_dict": {PATCHES: 4},
        "text_config": {"moe_num_experts": 4, "moe_topk": 2, "num_key_value_heads": 4},
    },
    "blip-2": {"num_query_tokens": 4, "qformer_config": {"num_hidden_layers": 2, "use_qformer_text_input": True}},
    "chameleon": {
        "vocabulary_map": {"<image>": 100, "IMGIMGAZ": 3, "IMGIMGBZ": 4},
        "vq_config": {**QUANTIZER, "num_embeddings": 2, "channel_multiplier": [1, 1, 1, 1]},
    },
    "cohere_compass": QWEN3_LIKE | {"text_config": {"rope_parameters": {"full_attention": ROTARY}}},
    "cosmos3_omni": QWEN3_LIKE,
    "dia": {
        "delay_pattern": [0, 1],
        "encoder_config": {"num_key_value_heads": 4},
        "decoder_config": {
            "num_channels": 2,
            "cross_hidden_size": 32,
            "cross_num_attention_heads": 4,
            "cross_num_key_value_heads": 4,
            "cross_head_dim": 8,
            "pad_token_id": 0,
        },
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "max_position_embeddings": 256},
        "vision_config": {"sam_config": SAM},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": SAM},
    "diffusion_gemma": {
        "boi_token_id": 98,
        "eoi_token_id": 99,
        "canvas_length": 9,
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16, "per_layer_config": {}},
        "vision_config": GEMMA4_VISION,
    },
    "dinat": {"num_heads": [2, 4], "depths": [1, 1], "dilations": [[1], [1]], "embed_dim": 16, "kernel_size": 3},
    "dots3_note": {"audio_token_id": 96, "audio_config": {"downsample_hidden_size": 8, "conv_output_size": 128}},
    "emu3": {
        "vocabulary_map": {
            "<image>": 100,
            "<|extra_200|>": 99,
            **{f"<|visual token {i:06d}|>": 3 + i for i in range(8)},
        },
        "vq_config": {**QUANTIZER, "codebook_size": 8, "channel_multiplier": [1, 1, 1, 1]},
    },
    "ernie4_5_vl_moe": {
        "vision_config": GRID_VISION,
        "text_config": {
            "rope_parameters": {**ROTARY, "mrope_section": [1, 1, 2]},
            "moe_intermediate_size": [16, 16],
            "moe_k": 2,
            "moe_num_experts": 4,
            "mlp_layer_types": ["dense", "sparse"],
        },
    },
    "fun_asr_nano": {
        "adaptor_config": {
            "hidden_size": 32,
            "intermediate_size": 8,
            "num_attention_heads": 4,
            "projector_hidden_size": 32,
        },
        "audio_config": {"num_stacked_frames": 1, "num_timestamp_prediction_layers": 1, "fsmn_kernel_size": 3},
    },
    "fuyu": {"num_hidden_layers": 2},
    **dict.fromkeys(("granite_speech", "granite_speech_plus"), GRANITE_SPEECH),
    "granite_speech5_ctc": {"encoder_config": {"context_size": 16, "num_key_value_heads": 4}},
    "granite4_vision": {
        "image_grid_pinpoints": [[SIDE, SIDE]],
        "spatial_target_layers": [0, 1],
        "deepstack_layer_map": [[0, 1]],
        "vision_config": {"hidden_size": 64},
        "qformer_config": {"num_hidden_layers": 1},
        "downsample_rate": "2/4",
    },
    "gemma4": {"vision_config": GEMMA4_VISION},
    "gemma4_unified": {
        "vision_config": {
            "patch_size": PATCH,
            "pooling_kernel_size": 1,
            "mm_embed_dim": 32,
            "mm_posemb_size": 16,
            "output_proj_dims": 32,
        }
    },
    "glm5_next": {
        **GRID_TOKENS,
        "image_start_token_id": 98,
        "image_end_token_id": 99,
        "vision_config": {**GRID_VISION, "out_hidden_size": 32, "projection_intermediate_size": 32},
        "text_config": {
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["linear_attention", "indexed_attention"],
            "indexer_types": ["full", "full"],
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 4,
            "index_kpool": 2,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "hc_mult": 2,
        },
    },
    "granite_docling": {"vision_config": {"out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0]}},
    "hunyuan_vl": {
        "text_config": {"rope_parameters": ROTARY},
        "vision_config": {"out_hidden_size": 32, "text_hidden_size": 32, "num_key_value_heads": 4},
    },
    "hy_v4_vl": {
        "vision_config": {"out_hidden_size": 32, "num_key_value_heads": 4},
        "text_config": {"rope_parameters": ROTARY, "num_key_value_heads": 4},
    },
    **dict.fromkeys(("inkling2", "inkling2_loop"), INKLING2),
    "inkling_mm_model": {
        "vision_config": {"text_hidden_size": 32, "num_hidden_layers": 2, "patch_size": PATCH},
        "audio_config": {"text_hidden_size": 32, "n_mel_bins": 16},
    },
    "instructblipvideo": {"num_query_tokens": 4, "video_token_index": 100},
    "kimi_k25": {
        "projection_hidden_size": 32,
        "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 1},
        "text_config": {"num_key_value_heads": 4},
    },
    "kosmos-2.5": {
        "latent_query_num": 4,
        "vision_config": {"patch_embed_hidden_size": 32, "max_num_patches": PATCHES},
        "text_config": {"embed_dim": 32, "layers": 2, "attention_heads": 4},
    },
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), MINICPM),
    "kyutai_speech_to_text": {
        "codebook_vocab_size": 33,
        "num_codebooks": 2,
        "audio_bos_token_id": 32,
        "audio_pad_token_id": 3,
        "num_key_value_heads": 4,
        "codec_config": {
            "num_filters": 4,
            "upsample_groups": 4,
            "num_quantizers": 2,
            "codebook_size": 32,
            "codebook_dim": 16,
        },
    },
    "molmo2": {
        "image_patch_id": 100,
        "text_config": {"additional_vocab_size": 8},
        "vision_config": {"image_size": [SIDE, SIDE], "num_position_embeddings": PATCHES, "num_key_value_heads": 4},
        "adapter_config": {
            "vision_feature_layer": [1, 0],
            "num_key_value_heads": 4,
            "text_hidden_size": 32,
        },
    },
    "moonshine_streaming": {
        "num_key_value_heads": 4,
        "encoder_config": {"sliding_windows": [[4, 2], [4, 0]], "num_key_value_heads": 4},
    },
    "muse_glimmer": MUSE,
    "muse_spark": {
        **MUSE,
        "audio_config": {
            "patch_sizes": [4, 2],
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": 32,
        },
        "text_config": {"moe_hidden_size": 32},
    },
    "nemo_speechlm": {
        "audio_config": {
            "hidden_size": ...,
            "asr_config": {"num_key_value_heads": 4},
            "diarization_config": {"head_config": {"audio_hidden_size": 32, "hidden_size": 16}},
        },
        "word_timestamp_config": {"blank_token_id": 100, "num_key_value_heads": 4},
        "text_config": {"conv_kernel": ...},
    },
    "nemotron_h_omni": {
        "vision_hidden_size": 32,
        "projector_hidden_size": 32,
        "vision_config": {"video_temporal_patch_size": 2},
        "text_config": {"conv_kernel": ...},
    },
    "neomme": {
        "rope_parameters": {"full_attention": HALF_TURN, "sliding_attention": HALF_TURN},
        "embedding_rank": 16,
        "embedding_dim": 16,
        "per_layer_config": {},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "paddleocr_vl": {
        "text_config": {"rope_parameters": ROTARY},
        "vision_config": {"spatial_merge_size": 2},
        **GRID_TOKENS,
    },
    "pp_formulanet": {"vision_config": {"decoder_hidden_size": 32}},
    "pi0": {"max_state_dim": 8, "max_action_dim": 8, "chunk_size": 4},
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 32, "d_kv": 8, "d_ff": 64, "seq_len": PATCHES}},
    "qwen2_5_omni_thinker": {
        **OMNI,
        "vision_config": {**GRID_VISION, "out_hidden_size": 32, "window_size": SIDE, "fullatt_block_indexes": [1]},
    },
    "qwen3_omni_moe_thinker": {
        **OMNI,
        "vision_config": QWEN3_VISION,
        "audio_config": {"n_window": 50, "n_window_infer": 100, "output_dim": 32, "downsample_hidden_size": 8},
    },
    "qwen3_asr": {
        "audio_config": {"n_window": 50, "n_window_infer": 100, "output_dim": 32, "downsample_hidden_size": 8}
    },
    "qwen4_exp": {
        **GRID_TOKENS,
        "vision_config": QWEN3_VISION,
        "text_config": {
            "layer_types": ["linear_attention", "indexed_attention"],
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    },
    "t5gemma2": {
        "image_token_index": 100,
        "eoi_token_index": 99,
        "encoder": {"mm_tokens_per_image": 4, "boi_token_index": 98, "eoi_token_index": 99, "image_token_index": 100},
    },
    "videoprism": {
        "vision_config": {
            "num_frames": 2,
            "tubelet_size": [1, PATCH, PATCH],
            "num_spatial_layers": 2,
            "num_temporal_layers": 2,
            "num_auxiliary_layers": 1,
        },
    },
    "vibevoice": {
        "semantic_model_config": CODEC,
        "audio_config": CODEC,
        "diffusion_head_config": {"latent_size": 32, "frequency_embedding_size": 16},
    },
    "vibevoice_asr": {
        "semantic_tokenizer_encoder_config": CODEC,
        "acoustic_tokenizer_encoder_config": CODEC,
        "acoustic_tokenizer_chunk_size": 1600,
    },
    "unlimited_ocr": {"vision_config": {"sam_config": SAM, "encoder_config": {"image_size": 16}}},
    "video_llava": {"video_token_index": 97},
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640, "image_size": 64},
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"block_sizes": [1, 1], "d_head": 8, "d_inner": 64, "num_hidden_layers": ...},
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
    **dict.fromkeys(("glm4v", "glm46v", "glmga"), GLM_VL),
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
        "embed_dim": ...,
        "patch_size": 16,
        "image_size": 64,
    },
    "lilt": {"hidden_size": 48},
    "llama4": {
        "vision_config": {
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "intermediate_size": 128,
        },
        "text_config": {"intermediate_size_mlp": 64, "num_experts_per_tok": 1},
    },
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), ONE_TILE),
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    "mistral_large4": {"text_config": {"num_key_value_heads": 4}},
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
"""Changes by ``model_type``; a dictionary changes a part of the configuration, and ``...`` leaves a usual size out."""


def with_own_sizes(name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes with those that a family needs, part by part."""
    return _joined(sizes, SIZES.get(name, {}))


def _joined(sizes: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in sizes.items() if own.get(key) is not ...}
    for key, value in own.items():
        inside = found.get(key)
        if isinstance(value, dict) and isinstance(inside, dict):
            found[key] = _joined(inside, value)
        elif value is not ...:
            found[key] = value
    return found
