"""Threads that generate with one model, whose forwards run together."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ace_triton.serving.joint import Joint

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 64, "num_hidden_layers": 2}


def generated(model, index):
    """Tokens of a member, drawn by its own seed."""
    ids = torch.arange(1, 3 + 4 * index)[None]
    torch.manual_seed(index)
    options = {"max_new_tokens": 6 + index, "min_new_tokens": 6 + index, "do_sample": index > 0, "pad_token_id": 0}
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


@pytest.mark.parametrize(
    ("made", "together"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), True),
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)), False),
    ],
)
def test_members_generate_what_each_generates_alone(made, together):
    """A cache with a window cannot be joined, so its rows run alone."""
    torch.manual_seed(0)
    model = made().eval()
    alone = [generated(model, index) for index in range(3)]
    rows = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    joint = Joint(model)
    start = threading.Barrier(3)

    def member(index):
        start.wait(30)
        with joint.member():
            return generated(joint.model, index)

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(member, range(3))) == alone
    joint.close()
    assert (max(rows) > 1) == together
