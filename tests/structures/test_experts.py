"""Whole experts go with their rows of the router, and the rest computes what it did without them."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from ace_triton import ArgumentError, RecipeError, shrink_model
from ace_triton.decoders.batches import Batch
from ace_triton.decoders.blocks import find_blocks
from ace_triton.decoders.calibration_mode import calibration_mode
from ace_triton.structures import routed
from ace_triton.structures.coupled import find_structures
from tests.conftest import _GATED, FAMILIES

MIXTURES = {
    "mixtral": {**_GATED, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **_GATED,
        "intermediate_size": 16,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention"] * 3,
    },
    "deepseek_v3": {
        **_GATED,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "phimoe": {**_GATED, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Stacks alone, stacks and routers with biases, a first block without experts, and a router without topk."""


@pytest.fixture
def make(make_decoder, monkeypatch):
    """make(family): a random mixture of experts whose biases and norms have values of their own."""

    def built(family):
        monkeypatch.setitem(FAMILIES, family, MIXTURES[family])
        return varied(make_decoder(family))

    return built


def varied(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.dim())))
    return model


def contributions(model, mixtures, batch):
    watchers = {name: routed.Contributions(mixture) for name, mixture in mixtures.items()}
    for watcher in watchers.values():
        with calibration_mode(model), watcher.batch(batch.shape, None):
            logits_of(model, batch.ids)
    return {name: watcher.of_batches() for name, watcher in watchers.items()}


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def without_experts(model, kept, ids):
    """Logits of Mixtral if no token is sent to removed experts: its router, written by hand."""

    def router(module, removed):
        def forward(hidden):
            logits = hidden.reshape(-1, hidden.shape[-1]) @ module.weight.t()
            logits[:, removed] = -float("inf")
            weights, index = logits.softmax(-1).topk(2)
            return logits, weights / weights.sum(-1, keepdim=True), index

        return forward

    for name, experts in kept.items():
        gate = model.get_submodule(f"{name}.gate")
        gate.forward = router(gate, [expert for expert in range(4) if expert not in experts])
    return logits_of(model, ids)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_go_and_the_model_loads(family, make, ids, tmp_path):
    model = make(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = shrink_model(model, ids, ratio=0.1, method="wanda-sp", groups=0, multiple=8)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert result.report.widths["experts"] == (4, 3)
    assert result.report.removed >= 0.1
    result.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    field = "n_routed_experts" if family == "deepseek_v3" else "num_local_experts"
    assert result.report.config == {field: 3}
    assert getattr(loaded.config, field) == 3
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(result.model, ids))
    if family == "mixtral":
        expected = without_experts(model, result.report.kept, ids)
        torch.testing.assert_close(logits_of(loaded, ids), expected, rtol=1e-4, atol=1e-5)


def test_the_importance_is_the_routing_weight_times_the_norm_of_the_output(make, ids, monkeypatch):
    model = make("mixtral")
    batch = Batch.of_ids(ids)
    with calibration_mode(model):
        mixtures = find_structures(model, find_blocks(model), batch).mixtures
    found = contributions(model, mixtures, batch)
    expected, inputs = torch.zeros(4), []
    mixture = model.model.layers[1].mlp
    mixture.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    logits_of(model, ids)
    weights, index = (inputs[0] @ mixture.gate.weight.t()).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    for expert in range(4):
        gate, up = (inputs[0] @ mixture.experts.gate_up_proj[expert].t()).chunk(2, -1)
        outputs = (nn.functional.silu(gate) * up) @ mixture.experts.down_proj[expert].t()
        expected[expert] = ((weights * (index == expert)).sum(-1) * outputs.norm(dim=-1)).mean()
    torch.testing.assert_close(found["model.layers.1.mlp"][0], expected.detach())
    monkeypatch.setattr(routed, "ROUTED", ())
    by_zeros = contributions(model, mixtures, batch)
    for name, values in found.items():
        torch.testing.assert_close(by_zeros[name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "flap", "update": "none"},
        {"method": "magnitude"},
        {"importance": "taylor", "update": "none"},
        {"stability": True, "update": "none"},
    ],
)
def test_a_dead_expert_goes_first(options, make, ids):
    model = make("mixtral")
    with torch.no_grad():
        for block in model.model.layers:
            for tensor in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
                tensor[2] = 0
    report = shrink_model(model, ids, ratio=0.1, groups=0, **options).report
    assert set(map(tuple, report.kept.values())) == {(0, 1, 3)}


def test_least_squares_of_attention_see_the_model_without_the_experts(make, ids):
    result = shrink_model(make("mixtral"), ids, ratio=0.3, groups=1, prior=1.0)
    assert result.report.widths == {"groups": (2, 1), "experts": (4, 3)}
    lost, left = result.report.output_error
    assert left < lost
    assert result.report.notes == ("no update makes up for removed experts; it is for channels and key-value groups",)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_channels_inside_experts_go_and_the_model_loads(family, make, ids, tmp_path):
    model = make(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"ratio": 0.1, "groups": 0, "multiple": 8, "experts": "channels"}
    result = shrink_model(model, ids, method="wanda-sp", **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert result.report.widths["expert_channels"] == (16, 8)
    assert result.report.config == {"intermediate_size": 8}
    result.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, kept in result.report.kept.items():
            down, dim = model.get_parameter(name), 2 if family == "mixtral" else 1
            for expert, channels in enumerate(kept):
                gone = [channel for channel in range(16) if channel not in channels]
                down[expert].index_fill_(dim - 1, torch.tensor(gone), 0.0)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "multiple", "step"), [(torch.float32, 5, 4), (torch.bfloat16, 6, 8)])
def test_a_width_that_experts_cannot_run_in_is_refused(dtype, multiple, step, make):
    model = make("deepseek_v3").to(dtype)
    options = {"method": "magnitude", "groups": 0, "multiple": multiple, "experts": "channels"}
    message = f"torch's grouped_mm runs experts in .* if the number is a multiple of {step}: give --multiple {step}"
    for amount in ({"ratio": 0.1}, {"speedup": 1.01}):
        with pytest.raises(ArgumentError, match=message):
            shrink_model(model, **amount, **options)
    report = shrink_model(model, ratio=0.1, **{**options, "multiple": step}).report
    assert report.widths["expert_channels"][1] % step == 0


@pytest.mark.parametrize("options", [{"method": "flap"}, {"method": "magnitude"}, {"importance": "taylor"}, {}])
def test_dead_channels_of_experts_go_first(options, make, ids):
    model = make("mixtral")
    with torch.no_grad():
        for block in model.model.layers:
            for expert in range(4):
                for channel in range(expert, 16, 2):
                    block.mlp.experts.down_proj[expert, :, channel % 16] = 0
                    block.mlp.experts.gate_up_proj[expert, [channel, 16 + channel]] = 0
    report = shrink_model(
        model, ids, ratio=0.05, groups=0, multiple=8, experts="channels", **{"update": "none", **options}
    ).report
    for kept in report.kept.values():
        assert [channels[:6] for channels in kept[:2]] == [[1, 3, 5, 7, 9, 11], [0, 2, 4, 6, 8, 10]]


def test_channels_of_experts_need_a_mixture(make_decoder, make, ids):
    with pytest.raises(ArgumentError, match="experts 'channels': no block has a mixture of experts"):
        shrink_model(make_decoder("llama"), ids, method="magnitude", multiple=8, experts="channels")
    with pytest.raises(RecipeError, match="method 'depth' removes whole blocks: leave experts out"):
        shrink_model(make("mixtral"), ids, method="depth", experts="channels")


def mute(model, kept):
    """Set the columns that read removed channels to 0, in layers and in stacks [experts, out_features, channels]."""
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name, channels in kept.items():
            down = layers[name].weight[None] if name in layers else model.get_parameter(name)
            for matrix, own in zip(down, channels if name not in layers else [channels], strict=True):
                matrix[:, [c for c in range(matrix.shape[1]) if c not in own]] = 0


def test_shared_experts_that_have_the_same_width_field_shrink_too(make, ids, tmp_path, monkeypatch):
    monkeypatch.setitem(MIXTURES, "deepseek_v3", {**MIXTURES["deepseek_v3"], "n_shared_experts": 2})
    model = make("deepseek_v3")
    result = shrink_model(model, ids, ratio=0.1, multiple=8, groups=0, experts="channels", update="none")
    assert result.report.widths["expert_channels"] == (16, 8)
    assert result.report.config == {"moe_intermediate_size": 8}
    counts = {name: len(kept) for name, kept in result.report.kept.items() if "shared" in name}
    assert set(counts.values()) == {16}
    assert len(counts) == 2
    result.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(result.model, ids))
    mute(model, result.report.kept)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), rtol=1e-4, atol=1e-5)


def test_a_shared_expert_with_a_width_of_its_own_keeps_it(make_decoder, ids, monkeypatch):
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}
    monkeypatch.setitem(FAMILIES, "qwen2_moe", {**_GATED, **sizes, "num_experts": 4})
    result = shrink_model(
        make_decoder("qwen2_moe"), ids, ratio=0.05, multiple=8, groups=0, experts="channels", update="none"
    )
    assert result.report.config == {"moe_intermediate_size": 8}
    assert not [name for name in result.report.kept if "shared" in name]


def test_experts_of_attention_stay(make_decoder, ids, monkeypatch, tmp_path):
    sizes = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8}
    experts = {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(FAMILIES, "jetmoe", {**sizes, **experts})
    model = varied(make_decoder("jetmoe"))
    with pytest.raises(ArgumentError, match="self_attention"):
        shrink_model(model, ids, ratio=0.1, method="magnitude")
    result = shrink_model(model, ids, ratio=0.1, multiple=8, experts="channels", update="none")
    assert result.report.widths["expert_channels"] == (16, 8)
    attention = sum(p.numel() for p in model.model.layers[0].self_attention.experts.parameters())
    share = attention / sum(p.numel() for p in model.model.layers[0].parameters())
    (note,) = result.report.notes
    assert note.startswith("the experts of attention stay (model.layers.0.self_attention.experts, ...)")
    assert note.endswith(f"{share:.1%} of the blocks' parameters")
    result.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    mute(model, result.report.kept)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), rtol=1e-4, atol=1e-5)


class ListedExperts(nn.Module):
    """A mixture with a module for each expert, as in code that comes with a model."""

    def __init__(self, config):
        super().__init__()
        width = config.intermediate_size
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(config.hidden_size, width), nn.ReLU(), nn.Linear(width, config.hidden_size))
            for _ in range(config.num_experts)
        )

    def forward(self, hidden):
        weights, index = self.gate(hidden).softmax(-1).topk(2, dim=-1)
        parts = [
            expert(hidden) * (weights * (index == e)).sum(-1, keepdim=True) for e, expert in enumerate(self.experts)
        ]
        return sum(parts)


class ListedLlama(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for block in self.model.layers:
            block.mlp = ListedExperts(config)
        self.post_init()


def test_experts_that_are_modules_are_renumbered(make_decoder, ids, tmp_path):
    config = make_decoder("llama").config
    config.num_experts = 4
    model = varied(ListedLlama(config).eval())
    with torch.no_grad():
        for block in model.model.layers:
            for parameter in block.mlp.experts[1].parameters():
                parameter.zero_()
    result = shrink_model(model, ids, ratio=0.05, method="llm-pruner", groups=0)
    assert set(map(tuple, result.report.kept.values())) == {(0, 2, 3)}
    result.model.save_pretrained(tmp_path)
    loaded = ListedLlama.from_pretrained(tmp_path).eval()
    last = loaded.model.layers[1].mlp
    assert torch.equal(last.experts[2][2].weight, model.model.layers[1].mlp.experts[3][2].weight)
    assert torch.equal(last.gate.weight, model.model.layers[1].mlp.gate.weight[[0, 2, 3]])
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(result.model, ids))


def test_a_token_needs_its_experts(make, ids):
    with pytest.raises(ArgumentError, match="2 of 4 experts, as tokens use 2"):
        shrink_model(make("mixtral"), ids, ratio=0.6, method="magnitude", groups=0)
    model = make("mixtral")
    model.model.layers[1].mlp.gate.weight = model.model.layers[0].mlp.gate.weight
    report = shrink_model(model, ids, ratio=0.01, method="magnitude").report
    assert "is shared with other layers" in report.refused["experts"]


class SentExperts(nn.Module):
    """A mixture whose experts are modules with a gate, and run on the tokens that are sent to them alone."""

    def __init__(self, config, sent):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.num_experts))
        self.sent = sent

    def forward(self, hidden):
        tokens, output = hidden.flatten(0, -2), torch.zeros_like(hidden).flatten(0, -2)
        logits = self.gate(tokens)
        logits[:, self.sent :] = -float("inf")
        weights, index = logits.softmax(-1).topk(2, dim=-1)
        for number, expert in enumerate(self.experts):
            token, place = (index == number).nonzero(as_tuple=True)
            if len(token):
                output.index_add_(0, token, expert(tokens[token]) * weights[token, place, None])
        return output.view_as(hidden)


class SentLlama(LlamaForCausalLM):
    """Llama with a mixture in each block; no token is sent to the last expert."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.model.layers:
            block.mlp = SentExperts(config, config.num_experts - 1)
        self.post_init()


@pytest.fixture
def sent(make_decoder):
    config = make_decoder("llama").config
    config.num_experts, config.intermediate_size, config.hidden_act = 4, 16, "silu"
    return varied(SentLlama(config).eval())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "saap"},
        {"method": "llm-pruner", "terms": "mixed"},
    ],
)
def test_channels_of_experts_that_are_modules_go_and_the_model_loads(options, sent, ids, tmp_path):
    for block in sent.model.layers:
        with torch.no_grad():
            for number, expert in enumerate(block.mlp.experts):
                expert.down_proj.weight[:, number::2] = 0
                expert.gate_proj.weight[number::2] = 0
                expert.up_proj.weight[number::2] = 0
    result = shrink_model(sent, ids, ratio=0.1, groups=0, multiple=8, experts="channels", update="none", **options)
    assert result.report.widths["expert_channels"] == (16, 8)
    assert result.report.config == {"intermediate_size": 8}
    for name, kept in result.report.kept.items():
        number = int(name.split(".")[-2])
        dead = set(range(number, 16, 2))
        assert not dead & set(kept), name
    result.model.save_pretrained(tmp_path)
    loaded = SentLlama.from_pretrained(tmp_path).eval()
    mute(sent, result.report.kept)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(sent, ids), rtol=1e-4, atol=1e-5)


def test_an_expert_of_another_kind_is_named(sent, ids):
    sent.model.layers[1].mlp.experts[2] = nn.Linear(sent.config.hidden_size, sent.config.hidden_size)
    with pytest.raises(ArgumentError, match=r"layers\.1\.mlp\.experts\.2 has other layers than"):
        shrink_model(sent, ids, ratio=0.1, method="magnitude", experts="channels")
