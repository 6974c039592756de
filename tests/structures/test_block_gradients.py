"""Taylor terms of a backward through one block at a time are those of a backward through the whole model."""

import pytest
import torch

from ace_triton import ArgumentError, ShrinkSettings
from ace_triton.decoders.batches import Batch
from ace_triton.decoders.blocks import find_towers
from ace_triton.decoders.kept_tensors import keeper
from ace_triton.structures.block_gradients import terms_by_block
from ace_triton.structures.coupled import find_structures
from ace_triton.structures.estimate import memory_phases
from ace_triton.structures.gradients import taylor_terms
from ace_triton.structures.weights import InMemory
from tests.structures.test_experts import varied

SUMS = ("gradient", "fisher")


def parts_of(model, ids):
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[0, :5] = False
    batches = [Batch.of_ids(ids[:2], valid), Batch.of_ids(ids[2:4]), Batch.of_ids(ids[4:])]
    (tower,) = find_towers(model)
    return tower, find_structures(model, tower.blocks, batches[0]), batches


def tensors_of(taylor):
    for by_name in (taylor.products, {"": taylor.elements}):
        for name in sorted(by_name):
            yield from by_name[name]
    for sums in (taylor.gradient, taylor.fisher):
        for name in sorted(sums):
            yield sums[name]


@pytest.mark.parametrize(
    ("family", "experts"),
    [("llama", "whole"), ("gemma3_text", "whole"), ("qwen3_moe", "whole"), ("qwen3_moe", "channels")],
)
def test_terms_are_those_of_the_whole_model(family, experts, make_decoder, ids, tmp_path):
    model = varied(make_decoder(family))
    tower, structures, batches = parts_of(model, ids)
    structures = structures.of_experts(experts)
    want, got, order = taylor_terms(model, structures, batches, sums=SUMS), {}, []

    def after(entries, terms):
        got.update(terms)
        order.append({entry.consumer.split(".")[2] for entry in entries})

    weights = InMemory()
    weights.keep = keeper(tmp_path)
    terms_by_block(model, tower, structures, batches, weights, after, sums=SUMS)
    assert order == [{"2"}, {"1"}, {"0"}]
    assert got.keys() == want.keys()
    for name, taylor in want.items():
        assert got[name].batches == taylor.batches == 3
        assert got[name].gradient.keys() == taylor.gradient.keys() != set()
        for one, other in zip(tensors_of(got[name]), tensors_of(taylor), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_blocks_that_share_more_than_hidden_states_are_refused(make_decoder, ids):
    model = varied(make_decoder("gemma4_text"))
    tower, structures, batches = parts_of(model, ids)
    with pytest.raises(ArgumentError, match=r"layers\.2 reads more of earlier blocks than their hidden states, so"):
        terms_by_block(model, tower, structures, batches, InMemory(), lambda *_: None)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    batch = Batch({"input_ids": ids, "position_ids": torch.arange(16).expand(6, 16)})
    with pytest.raises(ArgumentError, match="gives no logits for each token of its text"):
        terms_by_block(model, tower, structures, [batch], InMemory(), lambda *_: None)


def test_a_run_in_files_has_the_sums_and_activations_of_one_block(make_decoder, ids):
    model = make_decoder("llama")
    tower, structures, batches = parts_of(model, ids)
    settings = ShrinkSettings(method="llm-pruner", terms="mixed")
    arguments = (model, structures, batches, model.state_dict(), settings, tower.blocks)
    whole, in_files, on_disk = (
        memory_phases(*arguments, **how)["gradients"]
        for how in ({}, {"in_files": True}, {"in_files": True, "hidden_in_memory": False})
    )
    assert in_files - on_disk == 4 * 96 * 32 * 4  # The hidden states at four borders, in fp32.
    block = sum(p.nbytes for p in tower.blocks[0].module.parameters())
    sums = 2 * sum(p.nbytes for p in tower.blocks[0].module.parameters() if p.dim() > 1)
    assert whole - on_disk >= 2 * (block + sums)
