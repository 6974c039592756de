"""torch's 2:4 product: its arguments are tested everywhere, its results on a GPU only."""

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from ace_triton.kernels.pack_nm import pack_nm
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.packed.semi_structured import backend_of, cutlass_weight, refusal, semi_structured_linear


def pruned(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16, n: int = 2, m: int = 4) -> torch.Tensor:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    return select_nm(weight, ScoreTerms(), n, m)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cutlass_gets_our_values_and_metadata_that_say_the_same(dtype):
    weight = pruned(64, 192, dtype)
    weight[3, 8:16] = 0
    weight[5, 4:7] = 0
    packed = pack_nm(weight, 2, 4)
    given = cutlass_weight(packed)
    assert given.packed.data_ptr() == packed.values.data_ptr()
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(given.packed, given.meta), weight)
    assert given.meta.nbytes * 16 == weight.nbytes


def test_metadata_are_made_once_and_again_when_the_weight_is_written():
    packed = pack_nm(pruned(32, 64), 2, 4)
    first = cutlass_weight(packed).meta
    assert cutlass_weight(packed).meta is first
    other = pruned(32, 64).flip(0)
    packed.meta.copy_(pack_nm(other, 2, 4).meta)
    packed.values.copy_(pack_nm(other, 2, 4).values)
    given = cutlass_weight(packed)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(given.packed, given.meta), other)


def test_metadata_made_while_a_graph_records_are_not_kept(monkeypatch):
    packed = pack_nm(pruned(32, 64), 2, 4)
    monkeypatch.setattr("ace_triton.packed.conversions.capturing", lambda device: True)
    recorded = cutlass_weight(packed).meta
    monkeypatch.undo()
    kept = cutlass_weight(packed).meta
    assert kept is not recorded
    monkeypatch.setattr("ace_triton.packed.conversions.capturing", lambda device: True)
    assert cutlass_weight(packed).meta is kept


def test_what_torch_does_not_take_is_refused_before(monkeypatch):
    monkeypatch.setattr("ace_triton.packed.semi_structured.backend_of", lambda device: "cutlass")
    assert refusal(pack_nm(pruned(32, 64), 2, 4)) is None
    assert "only 2:4" in refusal(pack_nm(pruned(32, 64, n=4, m=8), 4, 8))
    assert "float16 and bfloat16" in refusal(pack_nm(pruned(32, 64, torch.float32), 2, 4))
    assert "multiples of 32 outputs" in refusal(pack_nm(pruned(48, 64), 2, 4))
    assert "and 64 inputs" in refusal(pack_nm(pruned(32, 96), 2, 4))


def test_there_is_none_on_a_cpu():
    assert backend_of(torch.device("cpu")) is None
    assert "no 2:4 product for cpu" in refusal(pack_nm(pruned(32, 64), 2, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("second_copy", [False, True])
def test_the_product_on_cuda(second_copy):
    packed = pack_nm(pruned(256, 512).cuda(), 2, 4)
    if refusal(packed):
        pytest.skip(refusal(packed))
    bias = torch.randn(256, device="cuda", dtype=torch.bfloat16)
    for rows in (1, 17, 100, 1024):
        tokens = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
        expected = tokens.double() @ pruned(256, 512).cuda().double().t() + bias
        outputs = semi_structured_linear(tokens, packed, bias, second_copy=second_copy)
        torch.testing.assert_close(outputs.double(), expected, rtol=2e-2, atol=0.2)
