import pytest
import torch

from ace_triton import ActivationStats, Gram, StatsError
from ace_triton.kernels import gram_product as products
from ace_triton.kernels.gram_product import bfloat16_products, gram_product, has_bfloat16_products
from ace_triton.solvers import least_squares
from ace_triton.statistics.token_sample import TokenSample

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def truth(tokens: torch.Tensor) -> torch.Tensor:
    rows = tokens.reshape(-1, tokens.shape[-1]).double()
    return rows.t() @ rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (300, 65), (0, 4)])
def test_products_are_exact_and_summed_in_fp32(dtype, shape):
    tokens = torch.randn(shape).to(dtype)
    got = gram_product(tokens)
    assert got.dtype == torch.float32
    wanted = truth(tokens)
    scale = wanted.diagonal().sqrt()
    error = (got - wanted).abs() / (scale[:, None] * scale).clamp(min=1e-30)
    assert not error.numel() or float(error.max()) < 1e-5


def test_the_setting_of_products_is_put_back():
    before = torch.backends.mkldnn.matmul.fp32_precision
    gram_product(torch.randn(9, 4, dtype=torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    fine = torch.randn(64, 64)
    torch.testing.assert_close((fine @ fine).double(), fine.double() @ fine.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("capability", "instructions", "fast"),
    [
        ("AVX512", {"avx512_bf16": True}, True),
        ("AVX512", {"avx512_bf16": False, "amx_bf16": True}, True),
        ("AVX512", {"avx512_f": True, "avx512_vnni": True}, False),
        ("AVX2", {"avx512_bf16": True}, False),
        ("DEFAULT", {}, False),
    ],
)
def test_products_are_rounded_only_by_instructions_for_them(monkeypatch, capability, instructions, fast):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setattr(products, "has_bfloat16_products", has_bfloat16_products.__wrapped__)
    monkeypatch.setattr(least_squares, "has_bfloat16_products", has_bfloat16_products.__wrapped__)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    with bfloat16_products():
        assert settings.fp32_precision == ("bf16" if fast else before)
    assert settings.fp32_precision == before
    assert least_squares.has_fast_bfloat16(torch.device("cpu")) is fast
    assert least_squares.has_fast_bfloat16(torch.device("cuda"))
    matrix = torch.eye(2)
    assert least_squares.rounded(matrix).dtype == (torch.bfloat16 if fast else torch.float32)
    wide = torch.empty(2 * least_squares.WIDEST_FACTOR, 1)
    assert least_squares.solves_by_factor(wide, 8) is not fast


def test_the_setting_of_products_is_put_back_by_the_last_of_several_threads(monkeypatch):
    monkeypatch.setattr(products, "has_bfloat16_products", lambda: True)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    one, other = bfloat16_products(), bfloat16_products()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert settings.fp32_precision == "bf16", "the other thread is still inside"
    other.__exit__(None, None, None)
    assert settings.fp32_precision == before != "bf16"

    def fail():
        with bfloat16_products(), bfloat16_products():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert settings.fp32_precision == before


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_batches_merge_and_padding_is_left_out(dtype):
    tokens, valid = torch.randn(6, 5, 12).to(dtype), torch.rand(6, 5) > 0.3
    whole, one, other = Gram(12), Gram(12), Gram(12)
    whole.update(tokens, valid)
    one.update(tokens[:2], valid[:2])
    one.update(tokens[2:3].masked_fill(~valid[2:3, :, None], torch.nan), valid[2:3])
    other.update(tokens[3:], valid[3:])
    for merged in (one + other, other + one, whole + Gram(12), Gram(12) + whole):
        assert merged.count == int(valid.sum())
        torch.testing.assert_close(merged.matrix.double(), truth(tokens[valid]), rtol=1e-4, atol=1e-4)


def test_sums_leave_their_parts_alone():
    one, other = Gram(3), Gram(3)
    one.update(torch.eye(3))
    other.update(2 * torch.eye(3))
    both = one + other
    both.update(torch.ones(1, 3))
    assert torch.equal(one.matrix, torch.eye(3))
    assert torch.equal(other.matrix, 4 * torch.eye(3))
    assert (one.count, other.count, both.count) == (3, 3, 7)


def test_reordered_is_that_of_reordered_tokens():
    tokens, order = torch.randn(20, 6), torch.randperm(6)
    gram, moved = Gram(6), Gram(6)
    gram.update(tokens)
    moved.update(tokens[:, order])
    torch.testing.assert_close(gram.reordered(order).matrix, moved.matrix)


def test_widths_that_differ_are_refused():
    gram = Gram(4)
    with pytest.raises(ValueError, match="5 channels, this Gram matrix 4"):
        gram.update(torch.randn(2, 5))
    with pytest.raises(ValueError, match="4 and 5 channels"):
        gram + Gram(5)


def test_statistics_carry_one_through_merging_moving_and_saving(tmp_path):
    first, second = torch.randn(2, 5, 8), torch.randn(3, 5, 8)
    stats = ActivationStats.from_tokens(first, gram=True)
    stats.merge(ActivationStats.from_tokens(second, gram=True))
    stats.save(tmp_path / "stats.safetensors")
    wanted = truth(torch.cat([first, second]))
    for carried in (stats, stats.to("cpu"), ActivationStats.load(tmp_path / "stats.safetensors")):
        assert carried.gram.count == 25
        torch.testing.assert_close(carried.gram.matrix.double(), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(StatsError, match="with and without a Gram matrix"):
        stats.merge(ActivationStats.from_tokens(second))


@pytest.mark.parametrize("valid", [torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5)])
def test_a_mask_of_another_shape_or_dtype_is_refused_and_nothing_is_added(valid):
    for taker in (Gram(8), TokenSample(8)):
        with pytest.raises(ValueError, match=r"valid must be bool of shape \(2, 5\)"):
            taker.update(torch.randn(2, 5, 8), valid)
        assert taker.count == 0
