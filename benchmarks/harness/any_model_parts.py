"""Small parts of configurations that several families share."""

from __future__ import annotations

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
EFFICIENT = {"width_coefficient": 0.5, "depth_coefficient": 0.5}
QUANTIZER = {
    "embed_dim": 8,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}
QWEN3_LIKE = QWEN_VL | {"vision_config": QWEN3_VISION}
HALF_TURN = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
GRANITE_SPEECH = {
    "downsample_rate": 2,
    "window_size": 4,
    "encoder_config": {
        "input_dim": 16,
        "hidden_dim": 32,
        "dim_head": 8,
        "output_dim": 16,
        "context_size": 16,
        "max_pos_emb": 16,
        "conv_kernel_size": 3,
    },
    "projector_config": {"encoder_hidden_size": 32},
}
MUSE = {
    "out_hidden_size": 128,
    "projector_hidden_size": 32,
    "vision_config": {
        "pos_emb_height": 4,
        "pos_emb_width": 4,
        "layer_types": ["window_attention", "full_attention"],
    },
}
OMNI = {
    "vision_start_token_id": 98,
    "vision_end_token_id": 99,
    "audio_start_token_id": 95,
    "audio_end_token_id": 96,
    "video_token_index": 97,
    "video_token_id": 97,
    "audio_token_index": 94,
    "audio_token_id": 94,
    "audio_config": {"n_window": 8, "output_dim": 32},
    "text_config": {"rope_parameters": ROTARY},
}
INKLING2 = {"vision_config": {"text_hidden_size": 32, "projection_hidden_dim": 32}}
MINICPM = {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}}
ONE_TILE = {"image_grid_pinpoints": [[SIDE, SIDE]]}
SAM = {
    "image_size": 64,
    "output_channels": 16,
    "mlp_dim": 64,
    "window_size": 2,
    "global_attn_indexes": [1],
    "downsample_channels": [16, 32],
}
GEMMA4_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": PATCH,
    "position_embedding_size": 16,
    "pooling_kernel_size": 2,
}
CODEC = {"num_filters": 4, "downsampling_ratios": [4, 5], "depths": [1, 1, 1], "hidden_size": 32}
