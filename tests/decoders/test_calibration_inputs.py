"""What a caller may give as calibration set, and the errors about what does not fit the model."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import BatchEncoding

from ace_triton import prune_model
from ace_triton.decoders.batches import Batch
from ace_triton.errors import ArgumentError
from tests.decoders.small_towers import KINDS, TEXT, VOCABULARY, make, mask


@pytest.mark.parametrize(
    ("name", "calibration", "message"),
    [
        ("bart", [], r"calibration has no batches: give at least one, a dict or a tuple of tensors"),
        (
            "bart",
            [torch.ones(1, 3).long()],
            r"calibration\[0\] is a tensor; .*: wrap it: \(tensor,\), or give",
        ),
        ("bart", {"input_ids": torch.ones(1, 3)}, r"is one batch, a dict with input_ids: put it in a list, \[batch\]"),
        (
            "bart",
            BatchEncoding({"input_ids": torch.ones(1, 3)}),
            "one batch, a BatchEncoding with input_ids: put it",
        ),
        ("bart", [(torch.ones(1, 3).long(), None)], r"calibration\[0\] is a tuple of other things than tensors"),
        (
            "bart",
            [(torch.ones(1, 3),)],
            r"calibration\[0\]\['input_ids'\] is torch.float32: token ids must be integers",
        ),
        ("bart", lambda: torch.ones(1, 3), "token ids, int64 .*; got torch.float32"),
        ("bart", [[1, 2]], r"calibration\[0\] is a list of other things than tensors; .* tuple of the forward's first"),
        (
            "bart",
            "text",
            "a DataLoader, or a function that returns them, each a dict .* a tuple .* got 'str'",
        ),
        ("bart", [{}], r"calibration\[0\] is an empty dict"),
        ("bart", [{"input_ids": [[1, 2]]}], r"calibration\[0\]\['input_ids'\] is a list; each input must be a tensor"),
        ("bart", [{"input_ids": torch.zeros(0, 3)}], r"\['input_ids'\] is an empty tensor"),
        ("bart", [{"input_ids": torch.full((1, 3), 101)}], r"run from 101 to 101, .* runs from 0 to 100"),
        (
            "bart",
            [{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.eye(2, 3)[[0, 0]] * torch.eye(2)[:, :1]}],
            "'attention_mask'.: sequence 1 is all padding",
        ),
        ("t5", [{"input_ids": torch.ones(1, 3).long()}], r"cannot run on the calibration inputs \(input_ids\)"),
        ("t5", torch.ones(1, 3).long(), "Give everything that its forward needs, in batches: dicts or tuples"),
        ("vit", torch.ones(1, 3).long(), "has no embedding of token ids; give the inputs of its forward"),
        ("plain", torch.ones(1, 3).long(), "has no embedding of token ids; give the inputs of its forward"),
        ("plain", [{"x": torch.ones(1, 3)}], r"cannot run on the calibration inputs \(x\)"),
    ],
)
def test_wrong_inputs_are_named(name, calibration, message):
    model, _ = make(KINDS[name])
    with pytest.raises(ValueError, match=message):
        prune_model(model, calibration, "wanda")


@pytest.mark.parametrize("tokens_of", [lambda ids: {"input_ids": ids}, lambda ids: (ids,)])
def test_an_error_of_the_forward_names_the_batch(tokens_of, make_decoder):
    model = make_decoder("gpt2")
    longest = model.config.max_position_embeddings
    before = model.state_dict()["transformer.h.0.mlp.c_fc.weight"].clone()
    batches = [tokens_of(torch.ones(1, 4).long()), tokens_of(torch.ones(1, longest + 5).long())]
    with pytest.raises(ArgumentError) as raised:
        prune_model(model, batches, "wanda")
    assert re.fullmatch(
        rf"GPT2LMHeadModel cannot run on calibration\[1\] \(input_ids \(1, {longest + 5}\)\): IndexError: .*; it has "
        rf"{longest + 5} tokens, and the model takes at most {longest}: use shorter sequences",
        str(raised.value),
    )
    assert isinstance(raised.value.__cause__, IndexError)
    assert torch.equal(model.state_dict()["transformer.h.0.mlp.c_fc.weight"], before)
    both = {"input_ids": torch.ones(1, 4).long(), "inputs_embeds": torch.ones(1, 4, model.config.hidden_size)}
    with pytest.raises(ArgumentError, match=r"calibration\[1\].*ValueError: .*; give inputs that the model's own"):
        prune_model(model, [batches[0], both], "wanda")
    with pytest.raises(
        ArgumentError, match=r"calibration\[0\] has 99 tensors, but GPT2LMHeadModel takes \d+ .*\w\): give"
    ):
        prune_model(model, [(torch.ones(1, 4).long(),) * 99], "wanda")
    prune_model(model, lambda: torch.ones(1, 4).long(), "wanda")


def test_a_mask_that_fits_no_tower_is_reported():
    """The mask of a waveform has one entry per sample, and the blocks read fewer frames."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    convolutions = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 8)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = Wav2Vec2Model(Wav2Vec2Config(**TEXT, **convolutions, **positions)).eval()
    sounds = {"input_values": torch.randn(2, 200), "attention_mask": mask(200, 120)}
    with pytest.warns(UserWarning, match=r"attention_mask has shape \(2, 200\), .* padding counts as tokens there"):
        report = prune_model(model, [sounds], "wanda")
    assert [(tower.name, tower.run) for tower in report.towers] == [("encoder.layers", "blocks")]
    assert len(report.layers) == 12


def test_a_mask_without_effect_is_reported():
    model, batches = make(KINDS["whisper"])
    with pytest.warns(UserWarning, match="attention_mask has no effect on what the first block of any tower reads"):
        prune_model(model, [{**batches[0], "attention_mask": mask(16, 9, 12, 16)}], "wanda")


def test_a_batch_size_is_only_for_token_ids():
    model, batches = make(KINDS["bert"])
    with pytest.raises(ValueError, match="batch_size is only for token ids"):
        prune_model(model, batches, "wanda", batch_size=2)


def test_inputs_get_the_dtype_of_the_model():
    model, batches = make(KINDS["vit"])
    report = prune_model(model.bfloat16(), batches, "wanda")
    assert len(report.layers) == 12


def test_weights_of_several_dtypes_are_named():
    """A decoder whose norms are in fp32 beside bf16 weights cannot run by itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**TEXT, **VOCABULARY}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.model.layers[0].input_layernorm.float()
    with pytest.raises(
        ArgumentError, match=r"several dtypes, bfloat16 \(.*\), float32 \(model\.layers\.0\.input_layer"
    ):
        prune_model(model, torch.randint(3, 99, (2, 8)), "wanda", "2:4")
    assert all(torch.equal(p.float(), before[name].float()) for name, p in model.named_parameters())


def test_a_trial_keeps_the_length_of_features_that_match_the_text_by_chance():
    """16 mel bins beside 16 tokens are no tokens."""
    tokens, sounds = torch.zeros(4, 16, dtype=torch.int64), torch.zeros(4, 16, 128)
    both = Batch({"input_ids": tokens, "input_features": sounds}).beginning(2, 8)
    assert {name: tuple(t.shape) for name, t in both.inputs.items()} == {
        "input_ids": (2, 16),
        "input_features": (2, 16, 128),
    }
    alone = Batch({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}).beginning(2, 8)
    assert {tuple(t.shape) for t in alone.inputs.values()} == {(2, 8)}
