"""Small random models with one or more towers, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {**TEXT, "image_size": 16, "patch_size": 8}
VOCABULARY = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TWO_STACKS = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
TWO_STACKS |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
IMAGE_TOKEN = 100


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**TEXT, **VOCABULARY, max_position_embeddings=32))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, **VOCABULARY, decoder_start_token_id=0))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(**TWO_STACKS, **VOCABULARY, max_position_embeddings=32))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**IMAGES))


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {**TEXT, **VOCABULARY, "max_position_embeddings": 32}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=IMAGES, projection_dim=16))


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {**TWO_STACKS, "num_mel_bins": 12, "max_source_positions": 8, "max_target_positions": 32}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **VOCABULARY, decoder_start_token_id=1))


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**TEXT, **VOCABULARY)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**IMAGES), text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=4
    )
    return LlavaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**TEXT, **VOCABULARY, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    )


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Plain(nn.Module):
    """No configuration and no embedding of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 3)
        self.stages = nn.ModuleList([PlainBlock() for _ in range(3)])

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        x = self.first(series)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def ids(length: int) -> torch.Tensor:
    return torch.randint(3, IMAGE_TOKEN, (4, length))


def mask(*lengths: int) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16)


def with_image_tokens() -> torch.Tensor:
    return torch.cat([torch.full((4, 4), IMAGE_TOKEN), ids(8)], 1)


SOURCE, TARGET = mask(12, 7, 9, 5), mask(6, 12, 4, 8)


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        make: makes a random model.
        inputs: makes a batch.
        towers: names of its towers, in order, each with the number of layers in it.
        masks: the input that masks the padding of what a tower reads, by name of the tower.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    towers: dict[str, int]
    masks: dict[str, str]


KINDS = {
    "bert": Kind(
        bert,
        lambda: {"input_ids": ids(12), "attention_mask": SOURCE},
        {"encoder.layer": 12},
        {"encoder.layer": "attention_mask"},
    ),
    "t5": Kind(
        t5,
        lambda: {"input_ids": ids(12), "attention_mask": SOURCE, "decoder_input_ids": ids(9)},
        {"encoder.block": 12, "decoder.block": 20},
        {"encoder.block": "attention_mask"},
    ),
    "bart": Kind(
        bart,
        lambda: {
            "input_ids": ids(12),
            "attention_mask": SOURCE,
            "decoder_input_ids": ids(12),
            "decoder_attention_mask": TARGET,
        },
        {"model.encoder.layers": 12, "model.decoder.layers": 20},
        {"model.encoder.layers": "attention_mask", "model.decoder.layers": "decoder_attention_mask"},
    ),
    "vit": Kind(vit, lambda: {"pixel_values": images()}, {"vit.layers": 12}, {}),
    "clip": Kind(
        clip,
        lambda: {"input_ids": ids(5), "attention_mask": mask(5, 3, 2, 4), "pixel_values": images()},
        {"vision_model.encoder.layers": 12, "text_model.encoder.layers": 12},
        {"text_model.encoder.layers": "attention_mask"},
    ),
    "whisper": Kind(
        whisper,
        lambda: {"input_features": torch.randn(4, 12, 16), "decoder_input_ids": ids(9)},
        {"model.encoder.layers": 12, "model.decoder.layers": 20},
        {},
    ),
    "llava": Kind(
        llava,
        lambda: {"input_ids": with_image_tokens(), "attention_mask": SOURCE, "pixel_values": images()},
        {"model.vision_tower.encoder.layers": 12, "model.language_model.layers": 14},
        {"model.language_model.layers": "attention_mask"},
    ),
    "qwen2_vl": Kind(
        qwen2_vl,
        lambda: {
            "input_ids": with_image_tokens(),
            "attention_mask": SOURCE,
            "mm_token_type_ids": (torch.arange(12) < 4).long().expand(4, 12),
            "pixel_values": torch.randn(64, 96),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 4),
        },
        {"model.visual.blocks": 8, "model.language_model.layers": 14},
        {"model.language_model.layers": "attention_mask"},
    ),
    "plain": Kind(Plain, lambda: {"series": torch.randn(4, 6, 8)}, {"stages": 6}, {}),
}


def make(kind: Kind) -> tuple[nn.Module, list[Inputs]]:
    """A random model and two batches, the same every time."""
    torch.manual_seed(0)
    return kind.make().eval(), [kind.inputs(), kind.inputs()]
