"""The loss of a recovery: its values and gradients are the definition's, in chunks or whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ace_triton.decoders.blocks import find_blocks
from ace_triton.recovery import distillation
from ace_triton.recovery.distillation import Distillation, divergence_of_hidden

SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
FAMILIES = {
    "llama": GATED,
    "gpt2": {"vocab_size": 101, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "phi": {**SIZES, "intermediate_size": 48},
    "gemma2": {**GATED, "head_dim": 8},
    "cohere": GATED,
}
"""Plain heads, a head with a bias (Phi), capped logits (Gemma 2) and scaled ones (Cohere)."""


def exact(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The divergence by its definition, in fp64, summed over tokens."""
    p, q = wanted.double().softmax(-1), logits.double().softmax(-1)
    return (p * (p.log() - q.log())).sum()


def make_pair(family: str) -> tuple[nn.Module, nn.Module]:
    """A random model, and its teacher with other weights in its blocks; both predict something."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family], **tokens)
    pair = [AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval() for _ in range(2)]
    pair[1].load_state_dict(pair[0].state_dict())
    with torch.no_grad():
        for decoder in pair:
            decoder.get_output_embeddings().weight.mul_(20)
        for block in find_blocks(pair[1]):
            for parameter in block.module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    for parameter in pair[0].get_output_embeddings().parameters():
        parameter.requires_grad_(False)
    return pair[0], pair[1]


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, 101, (5, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 53 * 3, 2**23])
def test_chunks_give_what_whole_logits_give(monkeypatch, bias, chunk):
    monkeypatch.setattr(distillation, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    head, wanted_head = (nn.Linear(24, 53, bias=bias) for _ in range(2))
    hidden, wanted = 3 * torch.randn(2, 2, 5, 24)
    leaf = hidden.clone().requires_grad_()
    expected = exact(head(leaf), wanted_head(wanted))
    expected.backward()
    gap = divergence_of_hidden(hidden, head, wanted, wanted_head)
    assert float(gap.loss) == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gap.gradient, leaf.grad, rtol=1e-3, atol=1e-5)
    assert gap.gradient.shape == hidden.shape


@pytest.mark.parametrize(
    ("family", "plain"), [("llama", True), ("gpt2", True), ("phi", True), ("gemma2", False), ("cohere", False)]
)
def test_chunks_only_where_logits_are_the_head_of_hidden_states(family, plain, text):
    model, teacher = make_pair(family)
    assert Distillation(model, teacher, text, torch.float32).from_hidden is plain


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_the_one_of_the_definition(monkeypatch, family, text):
    """Of the whole text's loss by autograd; parts of two sequences, where logits are whole, add up to it."""
    monkeypatch.setattr(distillation, "WHOLE_TOKENS", 24)
    model, teacher = make_pair(family)
    parameters = [p for block in find_blocks(model) for p in block.module.parameters()]
    with torch.no_grad():
        wanted = teacher(text, use_cache=False).logits
    loss = exact(model(text, use_cache=False).logits, wanted) / text.numel()
    expected = torch.autograd.grad(loss, parameters)
    told = Distillation(model, teacher, text, torch.float32).backward(text)
    assert told == pytest.approx(float(loss.detach()), rel=1e-4)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
