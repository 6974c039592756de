"""pack_nm, pack_scored and unpack_nm against the references and against each other, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.pack_nm import (
    PackedNM,
    PatternError,
    pack_cutlass,
    pack_nm,
    pack_nm_reference,
    pack_scored,
    pack_scored_reference,
)
from ace_triton.kernels.packed_nm import unpack_bits
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import GROUP_SIZES, select_nm
from ace_triton.kernels.unpack_nm import unpack_nm

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PATTERNS = [(n, m) for m in GROUP_SIZES for n in sorted({1, m // 2, m - 1})]
MOST_GROUPS = 4 if interpreting() else 40


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same(got: PackedNM, expected: PackedNM) -> None:
    assert (got.n, got.m, got.shape) == (expected.n, expected.m, expected.shape)
    assert got.meta.dtype == torch.int32
    assert torch.equal(got.meta, expected.meta)
    assert got.values.dtype == expected.values.dtype
    assert torch.equal(bits_of(got.values), bits_of(expected.values))


def make_pruned(make_matrix, rows: int, cols: int, dtype: torch.dtype, n: int, m: int, seed: int = 0) -> torch.Tensor:
    """A weight with at most n non-zeros of every m, some of them NaN, and zeros of both signs."""
    weight = make_matrix(rows, cols, dtype, "ties" if seed % 2 else "special", seed)
    weight[::3, ::5] = torch.nan
    drawn = torch.rand(rows, cols // m, m, generator=torch.Generator().manual_seed(seed))
    kept = drawn.argsort(-1).argsort(-1).flatten(1).to(weight.device) < n
    return torch.where(kept | (weight == 0), weight, 0.0)


@given(
    rows=st.integers(0, MOST_GROUPS),
    groups=st.integers(0, MOST_GROUPS),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(FLOATS),
    values=st.sampled_from(["normal", "ties", "special"]),
    present=st.sets(st.sampled_from(["row", "col", "scale", "coupling"])),
    seed=st.integers(0, 1000),
)
def test_packs_what_the_selection_keeps(make_matrix, make_terms, rows, groups, pattern, dtype, values, present, seed):
    n, m = pattern
    weight = make_matrix(rows, groups * m, dtype, values, seed)
    terms = make_terms(rows, groups * m, tuple(sorted(present)), 1 + seed % 2, seed)
    before = weight.clone()
    packed = pack_scored(weight, terms, n, m)
    assert torch.equal(bits_of(weight), bits_of(before)), "the weight may only be read"
    packed.check()
    assert_same(packed, pack_scored_reference(weight, terms, n, m))
    pruned = select_nm(weight, terms, n, m)
    assert torch.equal(bits_of(unpack_nm(packed)), bits_of(pruned))
    assert_same(pack_nm(pruned, n, m), packed)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (3, 8), (5, 32), (1, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_pruned_weights_come_back_bit_by_bit(make_matrix, dtype, n, m, seed):
    cols = 3 * m if interpreting() else 1056
    weight = make_pruned(make_matrix, 5, cols, dtype, n, m, seed)
    packed = pack_nm(weight, n, m)
    packed.check()
    assert_same(packed, pack_nm_reference(weight, n, m))
    back = unpack_nm(packed)
    # A group may contain more negative zeros than it keeps: the others are unpacked as positive zeros.
    signed = (weight != 0) | ~torch.signbit(weight)
    assert torch.equal(bits_of(back)[signed], bits_of(weight)[signed])
    assert bool((back[~signed] == 0).all())
    fits = ((weight != 0) | torch.signbit(weight)).reshape(5, -1, m).sum(-1, keepdim=True) <= n
    fits = fits.expand(-1, -1, m).reshape(weight.shape)
    assert torch.equal(bits_of(back)[fits], bits_of(weight)[fits])


def test_layout_is_the_documented_one(device):
    weight = torch.zeros(2, 36, device=device)
    weight[0, [1, 2, 8, 35]] = torch.tensor([3.0, -4.0, 5.0, 6.0], device=device)
    packed = pack_nm(weight, 2, 4)
    assert packed.meta.shape == (2, 2)
    kept = unpack_bits(packed.meta)[0].nonzero()[:, 0].tolist()
    # Groups are filled up from the highest index: {1, 2}, {6, 7}, {8, 11}, ... and {34, 35}; no bit past input 35.
    assert kept == [1, 2, 6, 7, 8, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31, 34, 35]
    assert packed.meta[0, 0].item() & 0xFFF == 0b1001_1100_0110
    assert packed.values[0, :6].tolist() == [3.0, -4.0, 0.0, 0.0, 5.0, 0.0]


def test_negative_zeros_are_kept_before_positive_ones(device):
    weight = torch.tensor([[-0.0, 0.0, 0.0, 1.0], [0.0, -0.0, -0.0, -0.0]], device=device)
    back = unpack_nm(pack_nm(weight, 2, 4))
    assert torch.signbit(back).tolist() == [[True, False, False, False], [False, False, True, True]]


def test_sizes():
    packed = pack_nm(torch.zeros(64, 4096, dtype=torch.bfloat16), 2, 4)
    assert packed.dense_bytes == 64 * 4096 * 2
    assert packed.packed_bytes / packed.dense_bytes == 0.5625
    assert packed.values.stride(0) * packed.values.element_size() % 16 == 0
    assert packed.to("cpu").values.data_ptr() == packed.values.data_ptr()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 8), (4, 32)])
def test_refuses_what_breaks_the_pattern(device, dtype, n, m):
    cols = 5 * m
    weight = torch.zeros(7, cols, dtype=dtype, device=device)
    weight[:, ::m] = 1
    weight[5, 3 * m : 3 * m + n + 1] = 2
    weight[6, : n + 1] = 2
    with pytest.raises(PatternError, match=rf"row 5, group 3 \(inputs {3 * m} to .* has {n + 1} non-zeros") as caught:
        pack_nm(weight, n, m)
    assert (caught.value.row, caught.value.group, caught.value.count) == (5, 3, n + 1)
    assert str(caught.value).startswith("row 5, group 3 ")
    weight[5:] = 0
    assert torch.equal(unpack_nm(pack_nm(weight, n, m)), weight)


def test_strided_weights(make_matrix):
    wide = make_matrix(12, 96, torch.bfloat16)
    select_nm(wide, ScoreTerms(), 2, 4)
    for weight in (wide[:, 16:48], wide[::2], wide.t()[:, ::3].t()):
        if weight.shape[1] % 4 == 0:
            assert torch.equal(unpack_nm(pack_nm(weight, 2, 4)), weight)
    parameter = torch.nn.Parameter(wide)
    assert torch.equal(unpack_nm(pack_scored(parameter, ScoreTerms(), 2, 4)), wide)


@given(data=st.data())
def test_check_finds_every_flipped_bit(data):
    packed = pack_nm(torch.eye(8, 40), 2, 4)
    packed.check()
    row, word, bit = (data.draw(st.integers(0, top)) for top in (7, 1, 31))
    packed.meta[row, word] ^= torch.tensor(1 << bit).to(torch.int32)
    with pytest.raises(PatternError, match="damaged") as caught:
        packed.check()
    assert caught.value.row == row
    assert caught.value.group == min(32 * word + bit, 40) // 4 or caught.value.group == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(8, 19)}, "must be contiguous"),
        ({"meta": torch.zeros(8, 1, dtype=torch.int32)}, "must be contiguous"),
        ({"values": torch.zeros(8, 20, dtype=torch.float64)}, "must be one of"),
        ({"meta": torch.zeros(8, 2, dtype=torch.int64)}, "torch.int32"),
        ({"n": 4}, "between 1 and 3"),
        ({"m": 5}, "m must be one of"),
    ],
)
def test_check_says_what_is_wrong(change, message):
    packed = pack_nm(torch.eye(8, 40), 2, 4)
    fields = {name: getattr(packed, name) for name in ("values", "meta", "n", "m", "shape")}
    with pytest.raises(ValueError, match=message):
        PackedNM(**{**fields, **change}).check()


@pytest.mark.parametrize(
    ("weight", "n", "m", "message"),
    [
        (torch.zeros(8), 2, 4, r"\[out_features, in_features\]"),
        (torch.zeros(8, 8, dtype=torch.float64), 2, 4, "float32, float16, bfloat16 or int8"),
        (torch.zeros(8, 6), 2, 4, "multiple of 4"),
        (torch.zeros(8, 8), 4, 4, "between 1 and 3"),
        (torch.zeros(8, 12), 2, 6, "m must be one of"),
    ],
)
def test_says_what_cannot_be_packed(weight, n, m, message):
    with pytest.raises(ValueError, match=message):
        pack_nm(weight, n, m)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(32, 64), (96, 192), (64, 320)])
@pytest.mark.parametrize("density", [0.3] if interpreting() else [0.0, 0.3, 1.0])
def test_cutlass_equals_torchs_converter(make_matrix, dtype, shape, density):
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    weight = make_matrix(*shape, torch.float32, "special", seed=int(10 * density))
    select_nm(weight, ScoreTerms(), 2, 4)
    left_out = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > density
    weight[left_out.to(weight.device)] *= 0
    weight = weight.nan_to_num().clamp(-99, 99).mul(1 if dtype.is_floating_point else 3).to(dtype)
    values, meta = sparse_semi_structured_from_dense_cutlass(weight)
    for source in (weight, pack_nm(weight, 2, 4)):
        got_values, got_meta = pack_cutlass(source)
        assert got_meta.dtype == meta.dtype
        assert torch.equal(got_meta, meta)
        assert torch.equal(bits_of(got_values), bits_of(values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("present", [(), ("row", "col", "scale", "coupling")])
@pytest.mark.parametrize("values", ["normal", "ties"])
def test_cutlass_in_the_selection_itself(make_matrix, make_terms, dtype, present, values):
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    weight = make_matrix(32, 96, dtype, values)
    before, terms = weight.clone(), make_terms(32, 96, present)
    got_values, got_meta = pack_cutlass(weight, terms)
    assert torch.equal(bits_of(weight), bits_of(before)), "the weight may only be read"
    values, meta = sparse_semi_structured_from_dense_cutlass(select_nm(weight, terms, 2, 4))
    assert torch.equal(got_meta, meta)
    assert torch.equal(got_values, values)


def test_cutlass_refuses_what_torch_would_damage(device):
    weight = torch.zeros(32, 32, dtype=torch.float16, device=device)
    weight[3, 4:7] = 1
    with pytest.raises(PatternError, match="row 3, group 1"):
        pack_cutlass(weight)
    with pytest.raises(ValueError, match="needs a multiple of 32 outputs"):
        pack_cutlass(weight[:24])
    with pytest.raises(ValueError, match="of 32 inputs"):
        pack_cutlass(weight[:, :16])
    with pytest.raises(ValueError, match="float16, bfloat16 or int8"):
        pack_cutlass(weight.float())
    with pytest.raises(ValueError, match="supports only 2:4"):
        pack_cutlass(pack_nm(torch.zeros(32, 32, dtype=torch.float16), 1, 2))
    with pytest.raises(ValueError, match="unpack it"):
        pack_cutlass(pack_nm(torch.zeros(32, 32, dtype=torch.float16), 2, 4), ScoreTerms())
    with pytest.raises(ValueError, match=r"got torch\.int8"):
        pack_cutlass(torch.zeros(32, 64, dtype=torch.int8), ScoreTerms())
