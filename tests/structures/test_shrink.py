"""A smaller model computes what the dense one computes without the removed structures, and transformers loads it."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

from ace_triton import ArgumentError, RecipeError, ShrinkSettings, prune_model, shrink_model
from ace_triton.recovery.train import RecoverySettings, recover
from ace_triton.structures import speed

GROUPED = {"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "qwen3_moe"}
"""Families whose heads can go, because their configuration has a width of heads of its own."""


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def masked_logits(model, report, ids):
    """The dense model's logits if each consumer reads 0 in place of removed structures; by hand, without our masks."""
    layers, handles = dict(model.named_modules()), []
    for name, structures in report.kept.items():
        layer = layers[name]
        size = layer.weight.shape[1] if isinstance(layer, torch.nn.Linear) else layer.weight.shape[0]
        width = size // report.widths["groups" if "o_proj" in name else "channels"][0]
        mask = torch.zeros(size)
        for structure in structures:
            mask[structure * width : (structure + 1) * width] = 1
        handles.append(layer.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
    found = logits_of(model, ids)
    for handle in handles:
        handle.remove()
    return found


def test_every_family_gets_smaller_and_loads(family, make_decoder, ids, tmp_path):
    model = make_decoder(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = shrink_model(model, ids, ratio=0.25, method="magnitude", multiple=8)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    report = result.report
    assert report.removed >= 0.25
    assert report.model_after == sum(p.numel() for p in set(result.model.parameters()))
    assert ("groups" in report.widths) == (family in GROUPED)
    result.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    experts = report.widths.get("experts", (0, 0))
    expected = masked_logits(model, report, ids) if experts[0] == experts[1] else logits_of(result.model, ids)
    torch.testing.assert_close(logits_of(loaded, ids), expected, rtol=1e-4, atol=1e-5)


def test_calibration_may_be_batches_of_any_kind(make_decoder, ids):
    model, batches = make_decoder("llama"), [(part,) for part in ids.split(2)]
    loader = DataLoader(TensorDataset(ids), batch_size=2)
    given = [[{"input_ids": part} for part in ids.split(2)], loader, iter(batches), lambda: iter(batches)]
    options = {"ratio": 0.3, "method": "wanda-sp", "multiple": 4, "groups": 0, "dry_run": True}
    first, *others = (shrink_model(model, calibration, **options).report.kept for calibration in given)
    assert others == [first] * 3


@pytest.mark.parametrize("name", sorted(GROUPED - {"qwen3_moe"}))
def test_groups_go_with_their_query_heads(name, make_decoder, ids, tmp_path):
    model = make_decoder(name)
    with torch.no_grad():
        for parameter in model.parameters():  # Biases are 0 and norms 1 in a new model, so a mistake would not show.
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    result = shrink_model(model, ids, ratio=0.01, method="magnitude", multiple=8, groups=1)
    assert result.report.widths["groups"] == (2, 1)
    assert result.report.widths["channels"] == (48, 48)
    assert (result.model.config.num_attention_heads, result.model.config.num_key_value_heads) == (2, 1)
    assert result.model.config.head_dim == 8
    result.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = masked_logits(model, result.report, ids)
    torch.testing.assert_close(logits_of(loaded, ids), expected, rtol=1e-4, atol=1e-5)
    assert loaded.generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
def test_blocks_go(name, make_decoder, ids, tmp_path):
    model = make_decoder(name)
    result = shrink_model(model, ids, ratio=0.3, method="depth")
    (gone,) = result.report.removed_blocks
    assert result.report.removed == pytest.approx(1 / 3)
    result.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    blocks[gone].forward = lambda hidden, *_, **__: hidden
    expected = logits_of(model, ids)
    torch.testing.assert_close(logits_of(loaded, ids), expected, rtol=1e-4, atol=1e-5)
    if name == "gemma3_text":
        kinds = model.config.layer_types
        assert loaded.config.layer_types == [kind for place, kind in enumerate(kinds) if place != gone]


def test_the_block_that_changes_least_goes(make_decoder, ids):
    model = make_decoder("llama")
    with torch.no_grad():
        for parameter in (model.model.layers[1].self_attn.o_proj.weight, model.model.layers[1].mlp.down_proj.weight):
            parameter.mul_(1e-3)
    assert shrink_model(model, ids, ratio=0.1, method="depth").report.removed_blocks == (1,)


def test_dead_channels_go_first_by_every_method_and_cost_nothing(make_decoder, ids):
    dead = torch.arange(1, 48, 3)
    saap = [{"fusion": name, "importance": "taylor"} for name in ("structure", "mean", "learned", "vector", "element")]
    pruner = [{"method": "llm-pruner", "terms": name} for name in ("vector", "element", "second", "mixed")]
    others = [
        {"importance": "taylor", "stability": True},
        {"stability": True},
        *({"method": n} for n in ("flap", "wanda-sp")),
    ]
    for options in (*saap, *pruner, *others, {"method": "wanda-sp"}, {"method": "magnitude"}):
        model = make_decoder("llama")
        with torch.no_grad():
            for block in model.model.layers:
                for weight in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight):
                    weight[dead] = 0
                block.mlp.down_proj.weight[:, dead] = 0
        result = shrink_model(model, ids, ratio=0.19, multiple=16, groups=0, update="none", **options)
        assert result.report.widths["channels"] == (48, 32)
        for kept in result.report.kept.values():
            assert not set(kept) & set(dead.tolist()), options
        torch.testing.assert_close(logits_of(result.model, ids), logits_of(model, ids), rtol=1e-4, atol=1e-5)


def test_least_squares_lower_the_error_and_the_bias_of_flap_too(make_decoder, ids):
    model = make_decoder("llama")
    dense = logits_of(model, ids)
    errors = {}
    for update in ("none", "bias", "lstsq"):
        options = {"ratio": 0.3, "method": "flap", "multiple": 8, "groups": 1, "prior": 1.0}
        result = shrink_model(model, ids, update=update, **options)
        errors[update] = float((logits_of(result.model, ids) - dense).norm())
        if update == "bias":
            assert (result.model.config.mlp_bias, result.model.config.attention_bias) == (True, True)
        if update != "none":
            lost, left = result.report.output_error
            assert left < lost
    assert errors["lstsq"] < errors["none"]
    assert errors["bias"] < errors["none"]
    place = shrink_model(make_decoder("mistral"), ids, method="flap", multiple=8, groups=0).report
    assert place.notes == ("no bias was written for feed-forward channels: MistralForCausalLM has no place for it",)


@pytest.mark.parametrize("groups", [0, 1])
def test_new_biases_count_in_the_ratio_the_size_and_the_dry_run(make_decoder, ids, groups):
    model, options = make_decoder("llama"), {"method": "flap", "multiple": 1, "groups": groups}
    for wanted in ({"ratio": 0.3}, {"size": 99_000}):
        planned = shrink_model(model, ids, dry_run=True, **wanted, **options).report
        result = shrink_model(model, ids, **wanted, **options)
        assert result.model.config.mlp_bias
        assert planned.removed == result.report.removed >= wanted.get("ratio", 0)
        assert planned.bytes_after == result.report.bytes_after <= wanted.get("size", 2**20)


def test_it_can_be_pruned_and_recovered_afterwards(make_decoder, ids, tmp_path):
    dense = make_decoder("llama")
    smaller = shrink_model(dense, ids, ratio=0.2, multiple=16, groups=0).model
    before = {name: parameter.clone() for name, parameter in smaller.named_parameters()}
    trained = recover(smaller, dense, ids, RecoverySettings(steps=2, tokens_per_step=32))
    matrices = {n: p for n, p in smaller.named_parameters() if ".layers." in n and p.dim() == 2}
    assert trained.trained == sum(matrix.numel() for matrix in matrices.values())
    assert all(not torch.equal(before[name], matrix) for name, matrix in matrices.items())
    report = prune_model(smaller, ids, "wanda", "2:4")
    assert report.account.share("pruned") > 0.9
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(smaller, ids))
    assert float((loaded.model.layers[0].mlp.down_proj.weight == 0).float().mean()) == 0.5


def test_sixteen_bits_and_a_dry_run(make_decoder, ids):
    model = make_decoder("qwen2").to(torch.bfloat16)
    result = shrink_model(model, ids, ratio=0.2, multiple=8)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    dry = shrink_model(model, ids, ratio=0.2, multiple=8, dry_run=True)
    assert dry.model is None
    assert (dry.report.widths, dry.report.model_after) == (result.report.widths, result.report.model_after)


def test_a_speed_up_is_measured_on_a_block(make_decoder, ids, monkeypatch):
    model = make_decoder("llama")
    size = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    sizes = []

    def seconds(modules, run, _clock):
        assert all(run(module)[0].shape[-1] == 32 for module in modules)
        sizes.append([sum(parameter.numel() for parameter in module.parameters()) for module in modules])
        return sizes[-1]

    options = {"method": "magnitude", "multiple": 4, "groups": 0}
    with pytest.raises(ArgumentError, match="no share of the structures makes a block 99 times as fast on one"):
        shrink_model(model, ids, speedup=99, **options)
    monkeypatch.setattr(speed, "_seconds", seconds)
    report = shrink_model(model, ids, speedup=1.25, **options).report
    assert any("times as fast on one token here" in note for note in report.notes)
    assert [dense for dense, _ in sizes] == [size] * len(sizes)
    assert 1.25 <= 1 / (1 - report.removed) < 1.4
    assert shrink_model(model, ids, speedup=1.4, method="depth").report.widths == {"blocks": (3, 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speedup": 1}, "speedup must be a number above 1"),
        ({"speedup": 2, "size": 1000}, "give ratio, size or speedup, one of them"),
        ({"size": 0}, "size must be a number of bytes"),
        ({"ratio": 0}, "ratio must be between 0 and 1"),
        ({"ratio": 1.5}, "ratio must be between 0 and 1"),
        ({"method": "slicegpt"}, "method must be one of saap, flap"),
        ({"update": "rescale"}, "update must be one of lstsq, bias, none"),
        ({"method": "flap", "fusion": "mean"}, "fusion is a setting of method 'saap'; 'flap' does not have it"),
        ({"method": "depth", "update": "lstsq"}, "no layer can make up for them"),
        ({"method": "depth", "groups": 1}, "leave groups out"),
        ({"multiple": 0}, "multiple must be an integer of at least 1"),
        ({"damping": 0, "prior": 0}, "damping and prior are both 0"),
        ({"width": 3}, "has no setting 'width'"),
        ({"widths": 3}, "widths must be one of equal, uneven; got 3"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        shrink_model(torch.nn.Linear(2, 2), None, **options)


def test_runs_that_are_refused(make_decoder, ids):
    model = make_decoder("llama")
    with pytest.raises(ArgumentError, match=r"ratio 0\.9 leaves nothing .* 48 channels in multiples of 64"):
        shrink_model(model, ids, ratio=0.9, method="magnitude")
    with pytest.raises(ArgumentError, match="leaves none of the 3 blocks"):
        shrink_model(model, ids, ratio=0.9, method="depth")
    with pytest.raises(ArgumentError, match="groups 2: each block has 2 key-value groups, and at most 1 can go"):
        shrink_model(model, ids, method="magnitude", groups=2)
    with pytest.raises(ArgumentError, match="needs calibration text"):
        shrink_model(model)
    with pytest.raises(ArgumentError, match="gradients underflow in float16"):
        shrink_model(make_decoder("llama").half(), ids, multiple=8, importance="taylor")
    with pytest.raises(ArgumentError, match="Sequential is no model of transformers"):
        shrink_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), method="magnitude")
    quantized = make_decoder("llama")
    quantized.model.layers[0].mlp.up_proj.weight.data = torch.zeros(48, 32, dtype=torch.float8_e4m3fn)
    with pytest.raises(ArgumentError, match="has quantized weights"):
        shrink_model(quantized, method="magnitude")
    with pytest.raises(RecipeError, match="give settings, or ratio"):
        shrink_model(model, ids, ratio=0.3, settings=ShrinkSettings())


def test_tied_layers_are_refused(make_decoder, ids):
    model = make_decoder("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    result = shrink_model(model, ids, ratio=0.05, method="magnitude", multiple=8)
    assert "shared with other layers" in result.report.refused["feed-forward channels"]
    assert result.report.widths == {"groups": (2, 1)}


def test_a_wrong_configuration_is_detected(make_decoder, ids, monkeypatch):
    """If transformers built something else from the smaller configuration, the run would fail instead of writing it."""
    from transformers import LlamaForCausalLM

    model = make_decoder("llama")
    own = LlamaForCausalLM.__init__

    def broken(self, config):
        own(self, config)
        for block in self.model.layers:
            block.self_attn.scaling *= 2 if config.num_key_value_heads == 1 else 1

    monkeypatch.setattr(LlamaForCausalLM, "__init__", broken)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.mul_(20)
    with pytest.raises(ArgumentError, match="computes something else than this model without the removed structures"):
        shrink_model(model, ids, ratio=0.01, method="magnitude", groups=1, multiple=8)
