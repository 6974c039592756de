"""Compiled decoding gives the tokens of the model as it is."""

import pytest
import torch

import ace_triton
from ace_triton import generation
from ace_triton.errors import GenerationError
from ace_triton.generation import generate


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_compiled_decoding_gives_the_same_text(tiny_model, tokenizer, temperature):
    """A packed model, traced by torch.compile without generating code."""
    ace_triton.prune_model(tiny_model, None, "magnitude", "2:4")
    ace_triton.pack_model(tiny_model)
    texts = []
    for compile in (None, "eager"):
        torch.manual_seed(0)
        options = {"max_new_tokens": 6, "temperature": temperature, "compile": compile}
        texts.append(generate(tiny_model, tokenizer, "a fox", **options))
    assert texts[0].text == texts[1].text
    assert texts[0].new_tokens == texts[1].new_tokens > 3


def test_without_a_compiler_the_error_says_so(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(generation.shutil, "which", lambda name: None)
    with pytest.raises(GenerationError, match=r"needs a C\+\+ compiler: install g\+\+, or name one in CXX"):
        generate(tiny_model, tokenizer, "a", max_new_tokens=4, compile="inductor")
