"""A GGUF file whose weights stay in it: each is dequantized when it is read, to the same values as in memory."""

import gguf as package
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from ace_triton import Recipe, prune_checkpoint, prune_model
from ace_triton.errors import CheckpointError
from ace_triton.inputs import checkpoint
from ace_triton.inputs.gguf_metadata import metadata_reader
from ace_triton.planning.pruning_plan import plan_pruning

HIDDEN, INNER, BLOCKS, HEADS, KEYS, VOCABULARY = 64, 96, 2, 4, 2, 101
HEAD = HIDDEN // HEADS
MATRICES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KEYS * HEAD, HIDDEN),
    "attn_v": (KEYS * HEAD, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
}
DENSE = {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
EXPERTS = {
    "ffn_gate_inp": (4, HIDDEN),
    "ffn_gate_exps": (4, 768, HIDDEN),
    "ffn_up_exps": (4, 768, HIDDEN),
    "ffn_down_exps": (4, HIDDEN, 768),
}
NORMS = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
HEAD_NORMS = {"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)}
SHORT = {
    "shortconv.in_proj": (3 * HIDDEN, HIDDEN),
    "shortconv.out_proj": (HIDDEN, HIDDEN),
    "shortconv.conv": (HIDDEN, 3),
}
FAMILIES = {
    "llama": [{**MATRICES, **DENSE, **NORMS}] * BLOCKS,
    "qwen2": [{**MATRICES, **DENSE, **NORMS}] * BLOCKS,
    "qwen3moe": [{**MATRICES, **EXPERTS, **NORMS, **HEAD_NORMS}] * BLOCKS,
    "lfm2": [{**SHORT, **DENSE, **NORMS}, {**MATRICES, **DENSE, **NORMS, **HEAD_NORMS}],
}
"""Tensors of each block by their GGUF names. transformers undoes a permutation in Llama, puts the experts of Qwen3-MoE
(whose width it takes to be 768) into one tensor, and converts LFM2 with weight conversions, not tensor processors."""


@pytest.fixture
def gguf(tmp_path):
    """gguf(family, tied=True, without=None): a random model in a GGUF file, its matrices in Q8_0 and Q4_0."""

    def write(family, *, tied=True, without=None):
        path = tmp_path / f"{family}.gguf"
        writer = GGUFWriter(path, family)
        writer.add_context_length(64)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_block_count(BLOCKS)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv([0, KEYS] if family == "lfm2" else KEYS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        if family == "qwen3moe":
            writer.add_key_length(HEAD)
            writer.add_expert_count(4)
            writer.add_expert_used_count(2)
        if family == "lfm2":
            writer.add_shortconv_l_cache(3)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{number}" for number in range(VOCABULARY)])
        writer.add_token_types([1] * VOCABULARY)
        writer.add_token_scores([0.0] * VOCABULARY)
        writer.add_token_merges([])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        random = np.random.default_rng(0)
        shapes = {"token_embd.weight": (VOCABULARY, HIDDEN)}
        shapes["token_embd_norm.weight" if family == "lfm2" else "output_norm.weight"] = (HIDDEN,)
        if not tied:
            shapes["output.weight"] = (VOCABULARY, HIDDEN)
        for number, block in enumerate(FAMILIES[family]):
            shapes |= {f"blk.{number}.{name}.weight": shape for name, shape in block.items()}
            if family == "qwen2":
                biased = ("attn_q", "attn_k", "attn_v")
                shapes |= {f"blk.{number}.{name}.bias": block[name][:1] for name in biased}
        for name, shape in shapes.items():
            if name == without:
                continue
            values = random.standard_normal(shape, dtype=np.float32)
            if len(shape) == 1 or "conv.conv" in name:
                writer.add_tensor(name, values)
                continue
            kind = GGMLQuantizationType.Q4_0 if "ffn" in name else GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def contents(folder):
    reports = ("ace_triton.json", "README.md")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in reports}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_gguf_file_is_the_same_streamed_and_in_memory(gguf, tmp_path, family):
    source = gguf(family, tied=family in ("llama", "lfm2"))
    ids = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))
    recipe = Recipe("magnitude") if family == "qwen3moe" else Recipe("wanda", update="lstsq")
    model, tokenizer = checkpoint.load(source)
    report = prune_model(model, ids, recipe)
    checkpoint.save(model, tokenizer, tmp_path / "memory", report.to_dict())
    streamed = prune_checkpoint(source, tmp_path / "streamed", ids, recipe)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")
    assert streamed.layers == report.layers


def test_the_hooks_run_the_model_and_hold_no_weight(gguf, tmp_path):
    source = gguf("llama")
    whole, _ = checkpoint.load(source, dtype=torch.float32)
    mapped, _ = checkpoint.load(source, dtype=torch.float32, offload_folder=tmp_path / "unused")
    ids = torch.arange(3, 19, device="cpu")[None]
    assert torch.equal(mapped(ids).logits, whole(ids).logits)
    assert all(parameter.is_meta for parameter in mapped.parameters())


def test_the_plan_counts_a_tensor_in_fp32_for_the_copy(gguf):
    plan = plan_pruning(gguf("llama"), Recipe("magnitude"), stream=True)
    assert plan.streams
    assert not plan.warnings
    copying = plan.streamed.phases["copy the weights"] - plan.streamed.phases["prune"]
    assert copying > 4 * HIDDEN * VOCABULARY


def test_a_tensor_that_the_file_lacks_is_named(gguf, tmp_path):
    for family, missing in (("llama", "blk.1.ffn_up.weight"), ("lfm2", "blk.1.ffn_up.weight")):
        source = gguf(family, without=missing)
        with pytest.raises(CheckpointError, match=r"1 missing \(model\.layers\.1\.\S+(up_proj|w3)\.weight\)"):
            prune_checkpoint(source, tmp_path / "out", None, Recipe("magnitude"))
        assert not (tmp_path / "out").exists()


def test_a_tensor_of_another_shape_is_named(gguf, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama", [{**MATRICES, **DENSE, **NORMS, "ffn_up": (INNER + 32, HIDDEN)}] * BLOCKS)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has the shape \(128, 64\) instead of \(96, 64\)"):
        prune_checkpoint(gguf("llama"), tmp_path / "out", None, Recipe("magnitude"))
    assert [path.name for path in tmp_path.iterdir()] == ["llama.gguf"]


def test_loading_reads_no_metadata_with_the_slow_reader_of_the_package(gguf, tmp_path, monkeypatch):
    built, own = [], GGUFReader.__init__
    monkeypatch.setattr(GGUFReader, "__init__", lambda self, path: built.append(type(self)) or own(self, path))
    source = gguf("llama")
    checkpoint.load(source)
    checkpoint.load(source, offload_folder=tmp_path / "unused")
    plan_pruning(source, Recipe("magnitude"))
    assert len(built) > 2
    assert set(built) == {metadata_reader()}
    assert package.GGUFReader is GGUFReader
