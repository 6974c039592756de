"""Small random checkpoints of several kinds of models, each with its tokenizer and processors, and files to run on."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.decoders import small_towers

WORDS = [chr(c) for c in range(ord("a"), ord("z") + 1)]


def bert_tokenizer(**special: str) -> Any:
    """Each letter is a word; [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "<image>"]
    table = {word: index for index, word in enumerate([*names, *WORDS])}
    words = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=32,
        additional_special_tokens=["<image>"],
        **special,
    )


def save_bert(folder: Path) -> None:
    save(small_towers.bert(), folder, bert_tokenizer())


def save_masked_bert(folder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**small_towers.TEXT, **small_towers.VOCABULARY, max_position_embeddings=32)
    save(BertForMaskedLM(config), folder, bert_tokenizer())


def save_t5(folder: Path) -> None:
    save(small_towers.t5(), folder, bert_tokenizer())


def save_vit(folder: Path) -> None:
    save(small_towers.vit(), folder, image_processor())


def save_clip(folder: Path) -> None:
    from transformers import CLIPProcessor

    save(small_towers.clip(), folder, CLIPProcessor(image_processor(), bert_tokenizer()))


def save_llava(folder: Path) -> None:
    from transformers import LlavaProcessor

    model: Any = small_towers.llava()
    model.config.image_token_id = 5
    model.config.vision_config.image_size = 16
    template = "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}"
    template += "{% endfor %}{% endfor %}"
    processor = LlavaProcessor(
        image_processor(),
        bert_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    save(model, folder, processor)


def save_whisper(folder: Path) -> None:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=12, chunk_length=1, hop_length=1000, n_fft=400)
    save(small_towers.whisper(), folder, extractor, bert_tokenizer())


def save_wav2vec2(folder: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (8, 4)}
    config = Wav2Vec2Config(
        **small_towers.TEXT,
        **convolutions,
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        vocab_size=32,
    )
    save(Wav2Vec2ForCTC(config), folder, Wav2Vec2FeatureExtractor())


def image_processor() -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def save(model: Any, folder: Path, *beside: Any) -> None:
    torch.manual_seed(0)
    model.save_pretrained(folder)
    for part in beside:
        part.save_pretrained(folder)


def write_images(folder: Path, count: int = 6) -> Path:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(pixels.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def write_sounds(folder: Path, count: int = 4, rate: int = 8000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(0)
    for number in range(count):
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(samples.integers(-9000, 9000, 2000 + 400 * number, dtype=np.int16).tobytes())
        (folder / f"{number}.txt").write_text("abc")
    return folder


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "bert": (save_bert, "text"),
    "masked bert": (save_masked_bert, "text"),
    "t5": (save_t5, "text"),
    "vit": (save_vit, "images"),
    "clip": (save_clip, "images"),
    "llava": (save_llava, "images"),
    "whisper": (save_whisper, "audio"),
    "wav2vec2": (save_wav2vec2, "audio"),
}
"""By kind, what saves its checkpoint and what it reads."""
