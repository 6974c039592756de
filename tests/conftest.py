"""A tiny model with a tokenizer of its own, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

VOCABULARY = 320


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {symbol: index + 2 for index, symbol in enumerate(alphabet)}
    bytes_only = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **words}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tiny_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, tiny_model, tokenizer) -> Path:
    folder = tmp_path / "tiny"
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def some_text(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path
