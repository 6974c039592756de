"""The field of config.json with the shapes of uneven feed-forwards: empty, or wrong in every way."""

import json

import pytest
import torch

from ace_triton import ArgumentError, CheckpointError, load_model, shrink_checkpoint, shrink_model
from ace_triton.planning.skeleton import skeleton
from ace_triton.structures.uneven import SHAPES, sized

MLP = "model.layers.0.mlp"
FIELD = {f"{MLP}.gate_proj.weight": [48, 32], f"{MLP}.up_proj.weight": [48, 32], f"{MLP}.down_proj.weight": [32, 48]}
BEYOND = {name: [1 << 20 if size == 48 else size for size in shape] for name, shape in FIELD.items()}


def with_field(folder, field):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, SHAPES: field}))
    return folder


@pytest.fixture
def uneven(tmp_path, tiny_model, tokenizer):
    config = tiny_model.config
    setattr(config, SHAPES, FIELD)
    model = sized(type(tiny_model))(config)
    model.save_pretrained(tmp_path / "uneven")
    tokenizer.save_pretrained(tmp_path / "uneven")
    return tmp_path / "uneven"


@pytest.mark.parametrize("empty", [{}, None, []])
def test_an_empty_field_means_equal_widths(empty, tiny_checkpoint, tiny_model):
    model, _ = load_model(with_field(tiny_checkpoint, empty))
    ids = torch.arange(2, 18)[None]
    assert torch.equal(model(ids).logits, tiny_model(ids).logits)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ([1], "must be an object with a shape for each name, got a list"),
        ("wide", "must be an object with a shape for each name, got a str"),
        ({**FIELD, f"{MLP}.up_proj.weight": [48]}, r"up_proj\.weight: a shape is two positive integers, got \[48\]"),
        ({**FIELD, f"{MLP}.up_proj.weight": 48}, "a shape is two positive integers, got 48"),
        ({**FIELD, f"{MLP}.up_proj.weight": [48, 0]}, r"a shape is two positive integers, got \[48, 0\]"),
        ({**FIELD, f"{MLP}.up_proj.weight": [48, True]}, r"a shape is two positive integers, got \[48, True\]"),
        ({**FIELD, "weight": [48, 32]}, "'weight' is no weight of a linear layer in a feed-forward of LlamaForCausal"),
        (
            {"model.embed_tokens.weight": [320, 32]},
            "'model.embed_tokens.weight' is no weight of a linear layer in a feed-forward",
        ),
        ({"lm_head.weight": [320, 32]}, "'lm_head.weight' is no weight of a linear layer in a feed-forward"),
        ({"model.layers.0.self_attn.q_proj.weight": [32, 32]}, "is no weight of a linear layer in a feed-forward"),
    ],
)
def test_a_wrong_field_is_one_plain_line(field, message, uneven):
    for door in (load_model, skeleton):
        with pytest.raises(CheckpointError, match=f"{SHAPES}.*{message}") as refused:
            door(with_field(uneven, field))
        assert str(refused.value).startswith(str(uneven))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    ("field", "message"),
    [
        (
            BEYOND,
            r"gate_proj\.weight cannot be \[1048576, 32\]: with equal widths it is \[64, 32\], and only the width",
        ),
        ({**FIELD, f"{MLP}.down_proj.weight": [32, 40]}, f"the layers of {MLP} do not have one width"),
        ({f"{MLP}.up_proj.weight": [48, 32]}, f"the layers of {MLP} do not have one width"),
    ],
)
def test_shapes_that_no_files_have_are_refused_before_they_are_allocated(field, message, stored, uneven):
    if not stored:  # Files of torch have no header with the shapes.
        (uneven / "model.safetensors").unlink()
        torch.save({}, uneven / "pytorch_model.bin")
    elif field.keys() == FIELD.keys():
        message = rf"is \[.*\], but {SHAPES} in config\.json says \["
    with pytest.raises(CheckpointError, match=message):
        load_model(with_field(uneven, field))


@pytest.mark.parametrize("method", ["depth", "magnitude"])
def test_an_uneven_model_cannot_be_shrunk_again(method, uneven, tmp_path):
    why = "its feed-forward widths differ from block to block .* cannot be shrunk again: shrink the dense model"
    ids = torch.arange(2, 18)[None]
    with pytest.raises(ArgumentError, match=why):
        shrink_model(load_model(uneven)[0], ids, method=method)
    with pytest.raises(ArgumentError, match=why):
        shrink_checkpoint(uneven, tmp_path / "out", ids, method=method)
    assert not (tmp_path / "out").exists()
