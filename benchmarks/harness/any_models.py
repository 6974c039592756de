"""Small random models of any AutoModel class, and inputs that they run on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ace_triton.inputs.model_inputs import Reads

from .any_model_inputs import IMAGE_TOKEN, OWN_INPUTS
from .any_model_parts import PATCH, PATCHES, TILES
from .any_model_sizes import SIZES
from .small_models import MOST_PARAMETERS, TRIED, NotMade, small_sizes

Inputs = dict[str, torch.Tensor]

SIDE, CHANNELS = 32, 3
VISION: dict[str, Any] = {
    "image_size": SIDE,
    "patch_size": 8,
    "num_channels": CHANNELS,
    "embed_dim": 32,
    "depths": [1, 1],
    "num_labels": 3,
    "image_token_id": IMAGE_TOKEN,
    "image_token_index": IMAGE_TOKEN,
    "projection_dim": 32,
}
AUDIO: dict[str, Any] = {
    "num_mel_bins": 16,
    "max_source_positions": 16,
    "max_target_positions": 64,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "max_length": 32,
    "audio_token_id": IMAGE_TOKEN,
    "audio_token_index": IMAGE_TOKEN,
}
LAYERS: dict[str, Any] = {
    name: value
    for part in ("encoder", "decoder")
    for name, value in (
        (f"{part}_layers", 2),
        (f"{part}_attention_heads", 4),
        (f"{part}_ffn_dim", 64),
        (f"num_{part}_layers", 2),
        (f"num_{part}_attention_heads", 4),
    )
} | {"d_kv": 8, "d_ff": 64}
SEQUENCES, LENGTH, DECODER_LENGTH = 4, 12, 9
IMAGE_TOKENS = (1, 4, 16, 17, 20, 36)
AUDIO_MASKS = ("feature_attention_mask", "input_features_mask")
AUDIO_TOKENS = (2, 4, 8, 16, 32)
NUMBER_OF_TOKENS = "tokens do not match"
"""Part of the errors of forwards that get another number of image tokens than they need."""
FRAMES = (32, 64, 256)
SAMPLES = 1600


def small_any_model(name: str, auto_class: str) -> tuple[PreTrainedModel, Inputs] | NotMade:
    """A small random model of a family that an AutoModel class makes, with inputs that it runs on; or why not."""
    reason = ""
    loader = getattr(transformers, auto_class)
    for kept, changed in TRIED:
        for extra in ({**LAYERS, **VISION, **AUDIO}, {}):
            try:
                sizes = small_sizes(AutoConfig.for_model(name), kept, {**changed, **extra})
                config = AutoConfig.for_model(name, **with_own_sizes(name, sizes))
                config.architectures = config.architectures or []  # Of several classes, the first.
                with torch.device("meta"):
                    parameters = sum(p.numel() for p in _made(loader, config).parameters())
                if parameters > MOST_PARAMETERS:
                    reason = reason or f"its smallest configuration here has {parameters:,} parameters"
                    continue
                torch.manual_seed(0)
                model = _made(loader, config).eval()
            except Exception as error:
                reason = reason or _words(error)
                continue
            found = _running_inputs(model)
            if isinstance(found, dict):
                return model, found
            reason = reason or found
    return NotMade(reason)


def _made(loader: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration. For two families of the same configuration AutoModel classes find none."""
    if type(config) in loader._model_mapping:
        return loader.from_config(config)
    return loader._model_mapping[type(config)]._from_config(config)


def _running_inputs(model: PreTrainedModel) -> Inputs | str:
    """The first inputs that a model runs on; why it does not run on the first of them, if it runs on none."""
    reason = ""
    for inputs in possible_inputs(model.config, Reads.of(model.forward, "")):
        try:
            with torch.no_grad():
                output = model(**inputs)
        except Exception as error:
            if not reason or NUMBER_OF_TOKENS in reason:
                reason = _words(error)
            continue
        if any(isinstance(value, torch.Tensor) for value in output.values()):
            return inputs
    return reason or "its forward takes no input by a usual name"


def possible_inputs(config: PreTrainedConfig, reads: Reads) -> Iterator[Inputs]:
    """Inputs by the names of a forward's arguments; several shapes if the configuration does not say which one fits."""
    if own := OWN_INPUTS.get(config.model_type):
        yield {name: value for name, value in own().items() if name in reads.arguments}
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, IMAGE_TOKEN, (SEQUENCES, length), generator=generator)

    def of_text(image_tokens: int = 0) -> Inputs:
        tokens = torch.cat([torch.full((SEQUENCES, image_tokens), IMAGE_TOKEN), ids(LENGTH)], 1)
        mask = torch.ones_like(tokens)
        mask[0, -3:] = 0
        return (
            {"input_ids": tokens, "attention_mask": mask}
            if "attention_mask" in reads.arguments
            else {"input_ids": tokens}
        )

    decoder = {"decoder_input_ids": ids(DECODER_LENGTH)} if reads.decoder_text else {}
    if reads.images:
        part = getattr(config, "vision_config", config)
        size = getattr(part, "image_size", None) or SIDE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = torch.randn(SEQUENCES, getattr(part, "num_channels", CHANNELS), height, width, generator=generator)
        texts = [*map(of_text, IMAGE_TOKENS), of_text()] if reads.text else [{}]
        for images in _images(part, reads, pixels):
            for text in texts:
                beside = _beside(reads, text, images)
                yield {**text, **images, **beside, **decoder}
        return
    for name in ("input_features", "input_values"):
        if name in reads.arguments:
            bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 16
            frames = [2 * getattr(config, "max_source_positions", 0), *FRAMES]
            shapes = [shape for count in filter(None, frames) for shape in ((bins, count), (count, bins))]
            for text in [*map(of_text, AUDIO_TOKENS), of_text()] if reads.text else [{}]:
                for shape in (*shapes, (SAMPLES,)):
                    whole = torch.ones(SEQUENCES, shape[-1], dtype=torch.int64)
                    masks = {mask: whole for mask in AUDIO_MASKS if mask in reads.arguments}
                    yield {**text, name: torch.randn(SEQUENCES, *shape, generator=generator), **masks, **decoder}
            return
    if reads.text:
        yield {**of_text(), **decoder}
        yield {"input_ids": ids(LENGTH), **decoder}
        yield {"input_ids": ids(2 ** math.ceil(math.log2(LENGTH))), **decoder}


def _images(part: PreTrainedConfig, reads: Reads, pixels: torch.Tensor) -> Iterator[Inputs]:
    """The forms in which forwards take the same images, those first that the names of their arguments ask for."""
    count, channels = len(pixels), pixels.shape[1]
    generator = torch.Generator().manual_seed(2)
    if "image_grid_thw" in reads.arguments:
        width = channels * getattr(part, "patch_size", PATCH) ** 2 * getattr(part, "temporal_patch_size", 1)
        rows = torch.randn(count * PATCHES, width, generator=generator)
        side = math.isqrt(PATCHES)
        yield {"pixel_values": rows, "image_grid_thw": torch.tensor([[1, side, side]] * count)}
    if "spatial_shapes" in reads.arguments:
        side = math.isqrt(PATCHES)
        yield {
            "pixel_values": torch.randn(count, PATCHES, channels * PATCH**2, generator=generator),
            "pixel_attention_mask": torch.ones(count, PATCHES, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[side, side]] * count),
        }
    if "aspect_ratio_ids" in reads.arguments:
        yield {
            "pixel_values": pixels[:, None, None].expand(-1, 1, TILES, -1, -1, -1).contiguous(),
            "aspect_ratio_ids": torch.ones(count, 1, dtype=torch.int64),
            "aspect_ratio_mask": torch.ones(count, 1, TILES, dtype=torch.int64),
        }
    sizes = {"image_sizes": torch.tensor([pixels.shape[-2:]] * count)} if "image_sizes" in reads.arguments else {}
    if sizes:
        yield {"pixel_values": pixels[:, None].expand(-1, 2, -1, -1, -1).contiguous(), **sizes}
    yield {"pixel_values": pixels, **sizes}
    yield {"pixel_values": pixels[:, None].contiguous(), **sizes}


def _beside(reads: Reads, text: Inputs, images: Inputs) -> Inputs:
    """What some forwards read beside token ids and images: where images are, and which tokens see them."""
    found: Inputs = {}
    if "input_ids" not in text:
        return found
    ids = text["input_ids"]
    if "mm_token_type_ids" in reads.arguments:
        found["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    if "token_type_ids" in reads.arguments and "mm_token_type_ids" not in reads.arguments and len(text) > 1:
        found["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    if "image_attention_mask" in reads.arguments:
        found["image_attention_mask"] = torch.ones(*ids.shape, 1, dtype=torch.int64)
    if "cross_attention_mask" in reads.arguments and "aspect_ratio_ids" in images:
        found["cross_attention_mask"] = torch.ones(*ids.shape, 1, TILES, dtype=torch.int64)
    if "image_embeds_position_mask" in reads.arguments:
        found["image_embeds_position_mask"] = (ids == IMAGE_TOKEN).long()
    if "qformer_input_ids" in reads.arguments:
        found["qformer_input_ids"] = ids[:, -4:]
    return found


def _words(error: Exception) -> str:
    """One line of an error, without what differs from machine to machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


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
