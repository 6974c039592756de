"""The report on rotated values, on a small model."""

from __future__ import annotations

import torch

from benchmarks.reports import rotations


def test_a_rotated_model_computes_the_same_and_n_m_prunes_less(tiny_model):
    ids = torch.arange(2, 66).reshape(4, 16)
    layer = tiny_model.model.layers[0].self_attn
    with torch.no_grad():
        before, weight = tiny_model(ids).logits, layer.v_proj.weight.clone()
        rotations.rotate(tiny_model, ids)
        after = tiny_model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert not torch.equal(layer.v_proj.weight, weight)
    assert rotations.pruned(layer.v_proj.weight.square()) < rotations.pruned(weight.square())


def test_the_two_smallest_of_four_are_pruned():
    values = torch.tensor([[3.0, 1.0, 4.0, 2.0, 0.0, 5.0, 0.0, 1.0]])
    assert float(rotations.pruned(values)) == 3.0
