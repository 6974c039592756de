"""Experts stacked in one parameter are pruned one by one, by the tokens routed to each."""

import pytest
import torch
from torch import nn

from ace_triton import PruneError, pack_model, prune_linear, prune_model
from ace_triton.decoders.blocks import find_blocks, possible_stacks, stacks_of
from ace_triton.decoders.experts import ExpertLinear, Layout, Stack, find_layouts

_SMALL = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 16, "num_experts_per_tok": 2}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MIXTURES = {
    "mixtral": ({**_GATED, "num_local_experts": 4}, False),
    "qwen3_moe": ({**_GATED, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}, False),
    "granitemoe": ({**_GATED, "num_local_experts": 4}, False),
    "gpt_oss": ({**_GATED, "head_dim": 8, "num_local_experts": 4}, True),
    "llama4_text": ({**_GATED, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48}, True),
}
"""Configurations of mixtures, and True if their stacks are [n_experts, in_features, out_features]."""


def make_mixture(family: str, *, experts_implementation: str | None = None, **changes):
    """A mixture with random weights from a fixed seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**MIXTURES[family][0], **_TOKENS, **changes})
    return AutoModelForCausalLM.from_config(config, experts_implementation=experts_implementation).eval()


@pytest.fixture(params=MIXTURES)
def mixture(request):
    """A mixture of each family, and True if its stacks are [n_experts, in_features, out_features]."""
    return make_mixture(request.param), MIXTURES[request.param][1]


@pytest.fixture
def ids():
    return torch.randint(3, 101, (16, 12), generator=torch.Generator().manual_seed(1))


def along_inputs(stack: Stack, transposed: bool) -> torch.Tensor:
    return stack.weight.detach().transpose(1, 2) if transposed else stack.weight.detach()


def test_every_expert_is_pruned(mixture, ids):
    model, transposed = mixture
    report = prune_model(model, ids, "ace")
    assert not report.skipped or {s.reason for s in report.skipped} == {"routers stay dense"}
    pruned = {layer.name for layer in report.layers}
    stacks = stacks_of(model)
    assert stacks
    for stack in stacks:
        groups = along_inputs(stack, transposed).reshape(len(stack.weight), -1, 4) != 0
        assert (groups.sum(-1) == 2).all(), stack.name
        assert {stack.expert_name(i) for i in range(4)} <= pruned


@pytest.mark.parametrize("how", [{}, {"sequential": "layers"}])
@pytest.mark.parametrize("family", sorted(MIXTURES.keys() - {"gpt_oss"}))
def test_dass_groups_an_experts_gate_and_up_along_their_outputs(ids, family, how):
    model, transposed = make_mixture(family), MIXTURES[family][1]
    dense = {stack.name: along_inputs(stack, transposed).clone() for stack in stacks_of(model)}
    report = prune_model(model, ids, "dass", batch_size=4, **how)
    axes = {layer.name: layer.axis for layer in report.layers}
    for stack in stacks_of(model):
        names = [stack.expert_name(index) for index in range(len(stack.weight))]
        gates = stack.name.endswith("gate_up_proj")
        assert {axes[name] for name in names} == {"out" if gates else "in"}
        pruned = along_inputs(stack, transposed)
        along = pruned.transpose(1, 2) if gates else pruned
        assert ((along.reshape(len(along), -1, 4) != 0).sum(-1) == 2).all()
        kept = pruned != 0
        assert torch.equal(pruned[kept], dense[stack.name][kept])


def test_dass_refuses_experts_whose_gate_and_up_alternate(ids):
    with pytest.raises(ValueError, match="gate and up alternate in its experts"):
        prune_model(make_mixture("gpt_oss"), ids, "dass")


def test_an_expert_is_scored_by_the_tokens_routed_to_it(ids):
    model = make_mixture("qwen3_moe")
    experts = find_blocks(model)[0].module.mlp.experts
    dense = experts.gate_up_proj.detach().clone()
    seen = {}
    with experts.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0], chosen=args[1])):
        model(ids)
    prune_model(model, ids, "wanda")
    for index, weight in enumerate(dense):
        layer = nn.Linear(32, 32, bias=False)
        layer.weight.data = weight.clone()
        prune_linear(layer, seen["hidden"][(seen["chosen"] == index).any(1)], "wanda")
        assert torch.equal(experts.gate_up_proj[index], layer.weight)


def test_an_expert_without_tokens_stays_dense_and_is_named(ids):
    model = make_mixture("qwen3_moe", num_experts=16, num_experts_per_tok=1)
    report = prune_model(model, ids[:1, :4], "wanda")
    unseen = {s.name for s in report.skipped if s.reason == "no calibration token reached it"}
    rest = [s for s in report.skipped if s.name not in unseen]
    assert [(s.name, s.reason, s.parameters) for s in rest] == [
        (f"model.layers.{index}.mlp.gate", "routers stay dense", 16 * 32) for index in range(2)
    ]
    for stack in stacks_of(model):
        for index, weight in enumerate(stack.weight):
            assert bool((weight == 0).any()) == (stack.expert_name(index) not in unseen)


def test_the_setting_for_experts_is_as_before(ids):
    model = make_mixture("qwen3_moe", experts_implementation="grouped_mm")
    prune_model(model, ids, "wanda")
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_is_a_view_of_its_stack(transposed):
    stack = Stack("mlp.experts.down_proj", nn.Parameter(torch.randn(3, 8, 4)))
    layers = stack.linears(transposed=transposed)
    assert list(layers) == [f"mlp.experts.{i}.down_proj" for i in range(3)]
    layer = layers["mlp.experts.1.down_proj"]
    assert isinstance(layer, ExpertLinear)
    assert (layer.out_features, layer.in_features) == ((4, 8) if transposed else (8, 4))
    layer.weight.data.zero_()
    assert not stack.weight[1].any()
    assert stack.weight[0].all()
    assert stack.weight[2].all()


def test_layouts_are_found_from_the_products():
    rows, cols, unused = (Stack(n, nn.Parameter(torch.randn(2, 4, 4))) for n in ("rows", "cols", "unused"))
    tokens = torch.randn(3, 4)
    index = torch.tensor(1)

    def run():
        nn.functional.linear(tokens, rows.weight[index])
        tokens @ cols.weight[0]
        torch.bmm(torch.randn(2, 3, 4), cols.weight)
        unused.weight.sum()

    assert find_layouts(run, [rows, cols, unused]) == {"rows": Layout(4, False), "cols": Layout(4, True)}


@pytest.mark.parametrize("n_experts", [1, 3])
@pytest.mark.parametrize("shape", [(4, 6), (6, 6)])
def test_layouts_of_stacks_that_are_read_transposed(n_experts, shape):
    """Inkling reads its shared experts like this; there may be only one of them."""
    block = nn.Module()
    block.gate, block.down = (nn.Parameter(torch.randn(n_experts, *sizes)) for sizes in (shape, shape[::-1]))
    stacks = possible_stacks(block, "b")
    assert [stack.name for stack in stacks] == ["b.gate", "b.down"]

    def run():
        hidden = torch.bmm(torch.randn(n_experts, 5, shape[1]), block.gate.transpose(1, 2))
        nn.functional.linear(torch.randn(5, shape[1]), block.down[0].t())
        assert hidden.shape == (n_experts, 5, shape[0])

    assert find_layouts(run, stacks) == {"b.gate": Layout(shape[0], False), "b.down": Layout(shape[1], True)}
    assert stacks[0].linears(transposed=False, rows=shape[0]).keys() == {f"b.{i}.gate" for i in range(n_experts)}


@pytest.mark.parametrize("shape", [(4, 6), (6, 6)])
def test_layouts_of_matrices_stored_one_below_the_other(shape):
    """As [out, in] and as [in, out], each read as stored and transposed. A weight read whole is not a stack."""
    names = ("linear", "linear_t", "product", "product_t", "whole", "uneven")
    stacks = {name: Stack(name, nn.Parameter(torch.randn(3 * shape[0], shape[1]))) for name in names}
    parts = {name: stack.weight.view(3, *shape)[2] for name, stack in stacks.items()}
    wide, tall = torch.randn(5, shape[1]), torch.randn(5, shape[0])

    def run():
        nn.functional.linear(wide, parts["linear"])
        nn.functional.linear(tall, parts["linear_t"].t())
        tall @ parts["product"]
        wide.matmul(parts["product_t"].T)
        nn.functional.linear(wide, stacks["whole"].weight)
        nn.functional.linear(wide, stacks["uneven"].weight[1 : 1 + shape[0]])

    assert find_layouts(run, stacks.values()) == {
        "linear": Layout(shape[0], False),
        "linear_t": Layout(shape[0], True),
        "product": Layout(shape[0], True),
        "product_t": Layout(shape[0], False),
    }


def test_a_stack_that_no_product_reads_is_named(ids):
    model = make_mixture("qwen3_moe")
    block = find_blocks(model)[1]
    block.module.extra = nn.Parameter(torch.randn(2, 4, 8))
    report = prune_model(model, ids, "magnitude")
    (skipped,) = (s for s in report.skipped if s.reason != "routers stay dense")
    assert (skipped.name, skipped.parameters) == (f"{block.name}.extra", 64)
    assert skipped.reason == "a 3-D weight that no matrix product of the model's forward reads"


def make_dbrx():
    """A random mixture whose experts are stored one below the other in two-dimensional matrices."""
    from transformers import DbrxConfig, DbrxForCausalLM

    torch.manual_seed(0)
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
    experts = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 101}
    return DbrxForCausalLM(DbrxConfig(**sizes, attn_config=attention, ffn_config=experts, **_TOKENS)).eval()


@pytest.mark.parametrize("how", [{}, {"sequential": "layers"}, {"include": "*.mlp.2.*"}])
def test_experts_stored_one_below_the_other_are_pruned_one_by_one(ids, how):
    model, dense = make_dbrx(), make_dbrx()
    report = prune_model(model, ids, "wanda", **how)
    experts = {layer.name for layer in report.layers if ".experts." in layer.name}
    pruned = (2,) if "include" in how else range(4)
    blocks = [f"transformer.blocks.{block}.ffn" for block in range(2)]
    assert experts == {f"{b}.experts.mlp.{i}.{matrix}" for b in blocks for i in pruned for matrix in ("w1", "v1", "w2")}
    if "include" not in how:
        assert [(s.name, s.reason) for s in report.skipped] == [
            (f"{b}.router.layer", "routers stay dense") for b in blocks
        ]
    for block in blocks:
        for matrix, inputs in (("w1", 32), ("v1", 32), ("w2", 16)):
            of_pruned, of_dense = (
                m.get_parameter(f"{block}.experts.mlp.{matrix}").view(4, 16, 32) for m in (model, dense)
            )
            for index in range(4):
                weight = of_pruned[index].t() if matrix == "w2" else of_pruned[index]
                kept = weight.reshape(-1, inputs // 4, 4) != 0
                assert (kept.sum(-1) == (2 if index in pruned else 4)).all()
            assert torch.equal(of_pruned[of_pruned != 0], of_dense[of_pruned != 0])
    assert report.account.blocks == 2 * (3 * 64 * 32 + 4 * 32 + 64 * 32 + 32 * 32)
    assert report.account.pruned == sum(layer.parameters for layer in report.layers)


def test_an_expert_stored_below_another_is_scored_by_the_tokens_routed_to_it(ids):
    model, seen = make_dbrx(), {}
    ffn = model.transformer.blocks[0].ffn
    dense = ffn.experts.mlp.w1.detach().view(4, 16, 32).clone()
    with ffn.experts.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0], chosen=args[1])):
        model(ids)
    prune_model(model, ids, "wanda")
    for index, weight in enumerate(dense):
        layer = nn.Linear(32, 16, bias=False)
        layer.weight.data = weight.clone()
        prune_linear(layer, seen["hidden"].reshape(-1, 32)[(seen["chosen"] == index).any(1)], "wanda")
        assert torch.equal(ffn.experts.mlp.w1.view(4, 16, 32)[index], layer.weight)


@pytest.mark.parametrize("how", [{"sparsity": "2:4"}, {"sparsity": "0.5"}, {"include": ["*.mlp.2.*", "*.attn*"]}])
def test_experts_stored_one_below_the_other_are_named_when_a_model_is_packed(ids, how):
    """Also if their zeros follow no pattern, or only some of the experts are pruned."""
    model = make_dbrx()
    if how.get("sparsity") == "0.5":
        prune_model(model, ids, "wanda", "2:4", include="*.attn*")
    prune_model(model, ids, "wanda", **how)
    report = pack_model(model)
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {"Wqkv", "out_proj"}
    named = {s.name: s for s in report.skipped if "experts" in s.name}
    assert named.keys() == {f"transformer.blocks.{b}.ffn.experts.mlp.{w}" for b in range(2) for w in ("w1", "v1", "w2")}
    parameters = sum(p.numel() for p in make_dbrx().parameters())
    for skipped in named.values():
        assert skipped.reason == "it is neither a linear layer nor a three-dimensional stack of two or more experts"
        assert (skipped.parameters, skipped.share) == (4 * 16 * 32, 4 * 16 * 32 / parameters)


@pytest.mark.parametrize("make", [lambda: make_mixture("qwen3_moe"), make_dbrx])
def test_an_expert_with_nan_is_named(ids, make):
    model = make()
    stack = next(p for name, p in model.named_parameters() if "experts" in name)
    stack.data[-1].flatten()[-1] = torch.nan
    with pytest.raises(PruneError, match=r"experts\..*\b3\.\w+: the weight holds NaN or infinity"):
        prune_model(model, ids, "wanda")
