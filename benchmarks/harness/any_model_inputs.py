"""Inputs of forwards that read other names or shapes than the usual ones, for small models of these families."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .any_model_parts import PATCH, PATCHES, SIDE

Inputs = dict[str, torch.Tensor]

IMAGE_TOKEN = 100
SEQUENCES, LENGTH, DECODER_LENGTH = 4, 12, 9
BINS = 16
WIDTH = 3 * PATCH**2
"""Values of a flat patch."""
GRID = torch.tensor([[1, 4, 4]] * SEQUENCES)
GRID_2D = torch.tensor([[row, column] for row in range(4) for column in range(4)]).expand(SEQUENCES, -1, -1)


def random(*shape: int) -> torch.Tensor:
    """Random values, the same in each run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def text(placeholders: int = 0, token: int = IMAGE_TOKEN, length: int = LENGTH) -> Inputs:
    """Token ids with the places of an image's or a sound's features in front, and an attention mask."""
    drawn = torch.randint(3, 90, (SEQUENCES, length), generator=torch.Generator().manual_seed(4))
    ids = torch.cat([torch.full((SEQUENCES, placeholders), token), drawn], 1)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _sound(name: str, placeholders: int, *shape: int, token: int = IMAGE_TOKEN) -> Inputs:
    return {**text(placeholders, token), name: random(SEQUENCES, *shape)}


def _patches(placeholders: int, *shape: int) -> Inputs:
    """Patches of all images in one row, with the grid of each image."""
    found = text(placeholders)
    marked = (found["input_ids"] == IMAGE_TOKEN).long()
    return {
        **found,
        "pixel_values": random(*shape),
        "image_grid_thw": GRID,
        "mm_token_type_ids": marked,
        "moe_mm_token_type_ids": marked,
    }


def _positioned(placeholders: int, width: int = WIDTH) -> Inputs:
    found = text(placeholders)
    return {
        **found,
        "pixel_values": random(SEQUENCES, PATCHES, width),
        "image_position_ids": GRID_2D,
        "mm_token_type_ids": (found["input_ids"] == IMAGE_TOKEN).long(),
    }


def _pictures(placeholders: int, side: int = SIDE) -> Inputs:
    return {**text(placeholders), "pixel_values": random(SEQUENCES, 3, side, side)}


def _decoder(*shape: int) -> Inputs:
    ids = torch.randint(3, 30, (SEQUENCES, *shape), generator=torch.Generator().manual_seed(5))
    return {"decoder_input_ids": ids}


def _masked_sound(placeholders: int, *shape: int, frames: int, dtype: torch.dtype = torch.int64) -> Inputs:
    whole = {"input_features_mask": torch.ones(SEQUENCES, frames, dtype=dtype)}
    return {**_sound("input_features", placeholders, *shape), **whole}


def _codebooks() -> Inputs:
    words = text(length=DECODER_LENGTH)["input_ids"] % 30 + 1
    return {"input_ids": words[:, :, None].expand(-1, -1, 3).contiguous()}


def _boxes() -> Inputs:
    found = text()
    corners = torch.tensor([0.1, 0.1, 0.4, 0.4]).expand(*found["input_ids"].shape, 4).contiguous()
    return {**found, "bbox": corners, "pixel_values": random(SEQUENCES, 3, SIDE, SIDE), **_decoder(DECODER_LENGTH)}


def _flat_patches() -> Inputs:
    where = (GRID_2D + 1).float()
    return {"flattened_patches": torch.cat([where, random(SEQUENCES, PATCHES, 32)], 2), **_decoder(DECODER_LENGTH)}


def _pooled() -> Inputs:
    """Patches, and for each place in the text the patches that are pooled into it."""
    found = text(4)
    pooling = torch.arange(PATCHES * SEQUENCES).reshape(-1, 4)
    return {
        **found,
        "pixel_values": random(SEQUENCES, PATCHES, WIDTH),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[2, 2, 0, 0]] * SEQUENCES),
        "image_num_crops": torch.ones(SEQUENCES, dtype=torch.int64),
        "mm_token_type_ids": (found["input_ids"] == IMAGE_TOKEN).long(),
    }


def _sizes(name: str, placeholders: int, pixels: torch.Tensor) -> Inputs:
    return {**text(placeholders), "pixel_values": pixels, name: torch.tensor([[SIDE, SIDE]] * SEQUENCES)}


def _actions() -> Inputs:
    cameras = {
        "pixel_values": random(SEQUENCES, 1, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.ones(SEQUENCES, 1, dtype=torch.bool),
    }
    return {**text(16), **cameras, "state": random(SEQUENCES, 8), "actions": random(SEQUENCES, 4, 8)}


def _omni(sound: int, frames: int, placeholders: int = 4) -> Inputs:
    found = _patches(placeholders, SEQUENCES * PATCHES, 2 * WIDTH)
    sounds = text(sound, 94)
    return {
        "input_ids": torch.cat([sounds["input_ids"][:, :sound], found["input_ids"]], 1),
        "attention_mask": torch.cat([sounds["attention_mask"][:, :sound], found["attention_mask"]], 1),
        "pixel_values": found["pixel_values"],
        "image_grid_thw": GRID,
        "input_features": random(SEQUENCES, BINS, frames),
        "feature_attention_mask": torch.ones(SEQUENCES, frames, dtype=torch.int64),
    }


def _video() -> Inputs:
    """An image and a video of two frames beside a text."""
    found = _pictures(16)
    frames = text(34, 97)["input_ids"][:, :34]
    ids = torch.cat([found["input_ids"], frames], 1)
    videos = random(SEQUENCES, 2, 3, SIDE, SIDE)
    pictures = {"pixel_values": found["pixel_values"], "pixel_values_images": found["pixel_values"]}
    return {"input_ids": ids, **pictures, "pixel_values_videos": videos}


def _packed_images(placeholders: int = 1) -> Inputs:
    """All images in one row of patches, with the number of rows and columns of each."""
    strip = random(1, 3, PATCH, PATCH * PATCHES * SEQUENCES)
    found = text(placeholders)
    marked = {"mm_token_type_ids": (found["input_ids"] == IMAGE_TOKEN).long()}
    return {**found, **marked, "pixel_values": strip, "target_sizes": torch.tensor([[4, 4]] * SEQUENCES)}


def _image_and_sound() -> Inputs:
    found = _patches(4, SEQUENCES * PATCHES, WIDTH)
    sounds = text(4, 96)["input_ids"][:, :4]
    return {
        "input_ids": torch.cat([found["input_ids"], sounds], 1),
        "pixel_values": found["pixel_values"],
        "image_grid_thw": GRID,
        "input_features": random(SEQUENCES, 128, 32),
        "chunk_sample_lengths": torch.full((SEQUENCES,), 4 * 1280),
    }


def _proteins() -> Inputs:
    found = text()
    return {**found, "protein_input_ids": found["input_ids"], "protein_attention_mask": found["attention_mask"]}


def _document() -> Inputs:
    found = text(4)
    return {
        **found,
        "flattened_patches": _flat_patches()["flattened_patches"],
        "image_embeds_position_mask": (found["input_ids"] == IMAGE_TOKEN).long(),
    }


OWN_INPUTS: dict[str, Callable[[], Inputs]] = {
    "deepseek_ocr2": lambda: _pictures(145, 2 * SIDE),
    "deepseek_vl_hybrid": lambda: {**_pictures(16), "high_res_pixel_values": random(SEQUENCES, 3, 64, 64)},
    "apertus1p5": lambda: _sizes("image_sizes", 16, random(SEQUENCES, 3, SIDE, SIDE)),
    "granite4_vision": lambda: _sizes("image_sizes", 10, random(SEQUENCES, 2, 3, SIDE, SIDE)),
    "dots3_note": _image_and_sound,
    "dia": lambda: {**text(), **_decoder(DECODER_LENGTH, 2)},
    "emu3": lambda: _sizes("image_sizes", 20, random(SEQUENCES, 3, SIDE, SIDE)),
    "ernie4_5_vl_moe": lambda: _patches(4, SEQUENCES * PATCHES, WIDTH),
    "evolla": _proteins,
    "fun_asr_nano": lambda: _masked_sound(32, 32, BINS, frames=32),
    "fuyu": lambda: {**text(16), "pixel_values": random(SEQUENCES, PATCHES, WIDTH)},
    "gemma4": lambda: _positioned(4),
    "gemma4_unified": lambda: _positioned(16),
    "granite_docling": lambda: {
        **text(4),
        "pixel_values": random(SEQUENCES, 1, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.ones(SEQUENCES, 1, dtype=torch.bool),
    },
    **dict.fromkeys(
        ("granite_speech", "granite_speech_plus"), lambda: _masked_sound(16, 32, BINS, frames=16, dtype=torch.bool)
    ),
    "granite_speech5_ctc": lambda: {"input_features": random(SEQUENCES, 64, 4 * BINS)},
    "hunyuan_vl": lambda: _patches(8, SEQUENCES * PATCHES, WIDTH),
    "hy_v4_vl": lambda: _patches(6, SEQUENCES * PATCHES, WIDTH),
    **dict.fromkeys(("inkling2", "inkling2_loop"), lambda: _patches(16, SEQUENCES * PATCHES, 2 * PATCH, 2 * PATCH, 3)),
    "inkling_mm_model": lambda: {**text(16), "pixel_values": random(SEQUENCES * 16, 2, PATCH, PATCH, 3)},
    "kosmos-2.5": _document,
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7"), _packed_images),
    "minicpm_ocr": lambda: _packed_images(4),
    "video_llava": _video,
    "kimi_k25": lambda: _patches(4, SEQUENCES * PATCHES, 3, PATCH, PATCH),
    "kyutai_speech_to_text": _codebooks,
    "llama4": lambda: _pictures(4),
    "llava_next_video": lambda: _sizes("image_sizes", 36, random(SEQUENCES, 2, 3, SIDE, SIDE)),
    "mistral_large4": lambda: _sizes("image_sizes", 4, random(SEQUENCES, 3, SIDE, SIDE)),
    "molmo2": _pooled,
    **dict.fromkeys(("muse_glimmer", "muse_spark"), lambda: _patches(4, SEQUENCES * PATCHES, 2 * WIDTH)),
    "nemo_speechlm": lambda: _masked_sound(8, 64, BINS, frames=64, dtype=torch.bool),
    "nemotron_h_omni": lambda: {
        **text(4),
        "pixel_values": random(SEQUENCES * PATCHES, WIDTH),
        "image_grid_hw": GRID[:, 1:],
    },
    "neomme": lambda: {**text(PATCHES), "pixel_values": random(SEQUENCES * PATCHES, WIDTH)},
    "omniasr": lambda: _sound("input_values", 16, 1, 323),
    "omniasr_ctc": lambda: {"input_values": random(SEQUENCES, 1, 1600)},
    "paddleocr_vl": lambda: _patches(4, SEQUENCES * PATCHES, 3, PATCH, PATCH),
    "pi0": _actions,
    "pix2struct": _flat_patches,
    "qwen2_5_omni_thinker": lambda: _omni(8, 32),
    "qwen3_omni_moe_thinker": lambda: _omni(13, 100),
    "qwen3_asr": lambda: _masked_sound(13, BINS, 100, frames=100),
    "udop": _boxes,
    "unlimited_ocr": lambda: _pictures(7, 2 * SIDE),
    "vibevoice": lambda: {
        **_sound("input_values", 16, 1, 320),
        "padding_mask": torch.ones(SEQUENCES, 320, dtype=torch.int64),
    },
    "vibevoice_asr": lambda: _sound("input_values", 16, 1, 320),
    "video_llama_3": lambda: {
        **_patches(16, SEQUENCES * PATCHES, WIDTH),
        "image_merge_sizes": torch.ones(SEQUENCES, dtype=torch.int64),
    },
    "videoprism": lambda: {**text(), "pixel_values_videos": random(SEQUENCES, 2, 3, SIDE, SIDE)},
    "voxtral_realtime": lambda: {
        "input_ids": text(length=16)["input_ids"],
        "input_features": random(SEQUENCES, BINS, 128),
    },
}
"""Inputs by ``model_type``, tried before those that are made from the names of the forward's arguments. Names that the
forward does not take are left out."""
