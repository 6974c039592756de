"""Prompts that are continued together get the texts that each gets alone."""

import pytest

import ace_triton
from ace_triton.batch_generation import generate_batch
from ace_triton.errors import GenerationError
from ace_triton.generation import generate
from ace_triton.kernels import cpu_library
from ace_triton.kernels.backend import ENVIRONMENT_VARIABLE

PROMPTS = ["a fox", "a fox that is quick", "x"]


@pytest.fixture
def packed(tiny_model, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    ace_triton.prune_model(tiny_model, None, "magnitude", "2:4")
    ace_triton.pack_model(tiny_model)
    return tiny_model.eval()


@pytest.mark.skipif(not cpu_library.available(), reason="no CPU library")
@pytest.mark.parametrize("decoder", ["auto", "transformers"])
def test_each_text_is_what_its_prompt_gets_alone(packed, tokenizer, decoder):
    packed.generation_config.eos_token_id = None
    options = {"max_new_tokens": 10, "decoder": decoder}
    endless = generate_batch(packed, tokenizer, PROMPTS, **options)
    assert endless.new_tokens == [10, 10, 10]
    assert endless.decoder == {"auto": "compiled"}.get(decoder, decoder)
    packed.generation_config.eos_token_id = [generated(packed, tokenizer, PROMPTS[1])[4]]
    found = generate_batch(packed, tokenizer, PROMPTS, **options)
    alone = [generate(packed, tokenizer, prompt, **options) for prompt in PROMPTS]
    assert found.texts == [one.text for one in alone]
    assert found.new_tokens == [one.new_tokens for one in alone]
    assert found.prompt_tokens == [one.prompt_tokens for one in alone]
    assert found.new_tokens[1] <= 5
    assert found.tokens_per_second == (sum(found.new_tokens) - 3) / found.seconds > 0


def generated(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()


def test_a_refused_model_and_wrong_calls(packed, tokenizer):
    packed.config.final_logit_softcapping = 30.0
    found = generate_batch(packed, tokenizer, PROMPTS, max_new_tokens=2)
    assert (found.decoder, found.refusal) == ("transformers", "it caps logits (final_logit_softcapping)")
    with pytest.raises(GenerationError, match="it caps logits"):
        generate_batch(packed, tokenizer, PROMPTS, max_new_tokens=2, decoder="compiled")
    with pytest.raises(GenerationError, match=r"prompts is one text: put it in a list, \[text\]"):
        generate_batch(packed, tokenizer, "abc")
    with pytest.raises(GenerationError, match="give at least one prompt"):
        generate_batch(packed, tokenizer, [])
