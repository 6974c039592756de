"""What "auto" chooses to decode several texts."""

import pytest
import torch

from ace_triton import pack_model, prune_model
from ace_triton.batch_generation import generate_batch
from ace_triton.decoding import several_texts
from ace_triton.decoding.several_texts import pays_in_step
from ace_triton.kernels import cpu_library


def test_mostly_packed_models_are_decoded_by_the_step(make_decoder):
    model = make_decoder("llama")
    assert not pays_in_step(model)
    pack_model(model, dense_bits=8, group=32, include="*.mlp.gate_proj")
    assert not pays_in_step(model), "the other layers have more than half of the weights"
    packed = make_decoder("llama")
    prune_model(packed, None, "magnitude", "2:4")
    pack_model(packed)
    assert pays_in_step(packed)


@pytest.mark.parametrize("instructions", [True, False])
def test_dense_bfloat16_is_decoded_by_the_step_without_instructions_for_it(make_decoder, monkeypatch, instructions):
    monkeypatch.setattr(several_texts, "multiplies_bfloat16", lambda device: instructions)
    assert pays_in_step(make_decoder("llama").to(torch.bfloat16)) is not instructions
    assert not pays_in_step(make_decoder("llama"))


@pytest.mark.skipif(not cpu_library.available(), reason="no CPU library")
def test_several_prompts_of_a_dense_model_go_to_transformers_and_one_to_the_step(tiny_model, tokenizer):
    chosen = [generate_batch(tiny_model, tokenizer, ["ab", "b"][:count], max_new_tokens=2) for count in (2, 1)]
    assert [found.decoder for found in chosen] == ["transformers", "compiled"]
    assert chosen[0].refusal is None
    asked = generate_batch(tiny_model, tokenizer, ["ab", "b"], max_new_tokens=2, decoder="compiled")
    assert asked.decoder == "compiled"
