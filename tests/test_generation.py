"""Compiled decoding gives the tokens of the model as it is."""

import pytest
import torch

import ace_triton
from ace_triton import generation
from ace_triton.errors import GenerationError
from ace_triton.generation import DECODERS, generate
from ace_triton.kernels import cpu_library
from ace_triton.kernels.backend import ENVIRONMENT_VARIABLE


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


@pytest.mark.skipif(not cpu_library.available(), reason="no CPU library")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_compiled_step_gives_the_same_text_and_says_so(tiny_model, tokenizer, temperature, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    found, pieces = {}, []
    for decoder in DECODERS:
        torch.manual_seed(0)
        options = {"max_new_tokens": 6, "temperature": temperature, "decoder": decoder}
        found[decoder] = generate(tiny_model, tokenizer, "a fox", write=pieces.append, **options)
    assert [one.decoder for one in found.values()] == ["compiled", "compiled", "transformers"]
    assert len({one.text for one in found.values()}) == 1
    assert "".join(pieces) == 3 * found["auto"].text


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 1e-6}])
def test_samples_among_one_token_are_the_most_likely_one(tiny_model, tokenizer, option):
    wanted = generate(tiny_model, tokenizer, "a fox", max_new_tokens=6)
    assert generate(tiny_model, tokenizer, "a fox", max_new_tokens=6, temperature=5.0, **option).text == wanted.text
    with pytest.raises(GenerationError, match=r"nothing is sampled, so top_[pk] would do nothing: give a temperature"):
        generate(tiny_model, tokenizer, "a fox", **option)


def test_a_refused_model_is_decoded_by_transformers_unless_the_step_is_asked_for(tiny_model, tokenizer):
    tiny_model.config.final_logit_softcapping = 30.0
    found = generate(tiny_model, tokenizer, "a fox", max_new_tokens=2)
    assert (found.decoder, found.refusal) == ("transformers", "it caps logits (final_logit_softcapping)")
    with pytest.raises(GenerationError, match="it caps logits"):
        generate(tiny_model, tokenizer, "a fox", max_new_tokens=2, decoder="compiled")
    with pytest.raises(GenerationError, match="decoder must be one of auto, compiled, transformers; got 'fast'"):
        generate(tiny_model, tokenizer, "a fox", max_new_tokens=2, decoder="fast")


def test_without_a_compiler_the_error_says_so(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(generation.shutil, "which", lambda name: None)
    with pytest.raises(GenerationError, match=r"needs a C\+\+ compiler: install g\+\+, or name one in CXX"):
        generate(tiny_model, tokenizer, "a", max_new_tokens=4, compile="inductor")
