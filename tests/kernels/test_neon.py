"""The CPU library's NEON code, run in an emulator: the same results, bit by bit, as portable code on this machine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch

from ace_triton.kernels import cpu, cpu_library
from ace_triton.kernels.backend import ENVIRONMENT_VARIABLE, interpreting
from ace_triton.kernels.gram_product import gram_product, gram_product_reference
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import pack_scored
from ace_triton.kernels.pack_rows import pack_rows, unpack_rows
from ace_triton.kernels.packed_dense import quantize_dense
from ace_triton.kernels.quantize_nm import quantize_nm
from ace_triton.kernels.quantized_linear import quantized_linear
from ace_triton.kernels.rows_linear import rows_linear
from ace_triton.kernels.score_terms import ScoreTerms
from tests.kernels.arm.emulation import EmulatedLibrary, build, missing
from tests.kernels.every_operation import DTYPES, PACKED_PATTERNS, Results, assert_same, every_operation, matrix

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(not cpu_library.available(), reason="compares with this machine's CPU library"),
    pytest.mark.skipif(interpreting(), reason="for the compiled library"),
]

PROCESSORS = {"max": ["neon_dotprod", "neon", "portable"], "cortex-a57": ["neon", "portable"]}
"""Models of the emulator, and the instruction sets that the library has for them. The first model has every extension,
the second none."""

SHAPES = [(32, 96), (7, 1036), (10, 1048), (65, 33), (130, 1), (1, 4)]


@pytest.fixture(autouse=True)
def chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture(scope="module", params=PROCESSORS)
def emulated(request: pytest.FixtureRequest) -> Iterator[EmulatedLibrary]:
    """The library on each processor in turn."""
    library = EmulatedLibrary(build(), request.param)
    yield library
    library.close()


@pytest.fixture
def on_arm(emulated: EmulatedLibrary, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The package calls the emulated library until ``undo()``, then this machine's."""
    data_ptr = torch.Tensor.data_ptr

    def noted(tensor: torch.Tensor) -> int:
        place = data_ptr(tensor)
        emulated.note(tensor)
        return place

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "data_ptr", noted)
        patched.setattr(cpu_library, "load", lambda: emulated)
        yield patched


def instruction_sets() -> Iterator[str]:
    """Use each NEON instruction set of the library in turn, and yield its name."""
    for name in ("neon_dotprod", "neon"):
        try:
            cpu_library.use_isa(name)
        except ValueError:
            continue
        yield name


def on_this_machine(results: Callable[[], Results]) -> Results:
    """What ``results()`` is with portable code of this machine."""
    in_use = cpu_library.isa()
    cpu_library.use_isa("portable")
    try:
        return results()
    finally:
        cpu_library.use_isa(in_use)


def compare(on_arm: pytest.MonkeyPatch, results: Callable[[], Results]) -> None:
    """``results()`` must be the same with every NEON instruction set as on this machine."""
    got = {name: results() for name in instruction_sets()}
    assert got
    on_arm.undo()
    expected = on_this_machine(results)
    for name, found in got.items():
        assert_same(found, expected, name)


def test_an_access_behind_a_buffer_is_seen():
    values, found = torch.zeros(8), ctypes.c_int32()
    library = EmulatedLibrary(build(), "max")
    library.note(values)
    assert library.ace_all_finite(values.data_ptr(), 1, 8, 8, 0, 0, 1, ctypes.byref(found)) == 0
    assert found.value == 1
    with pytest.raises(RuntimeError, match="ace_all_finite crashed in the emulator"):
        library.ace_all_finite(values.data_ptr(), 1, 9, 9, 0, 0, 1, ctypes.byref(found))


def test_the_best_instruction_set_is_chosen(emulated, request):
    expected = PROCESSORS[request.node.callspec.params["emulated"]]
    assert emulated.ace_isa().decode() == expected[0]
    listed = [name for name in (*cpu_library.ISAS, "sse9") if emulated.ace_use_isa(name.encode()) == 0]
    assert listed == expected
    emulated.ace_use_isa(expected[0].encode())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_every_operation(on_arm, dtype, rows, cols):
    compare(on_arm, lambda: every_operation(rows, cols, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [64, 352, 1120])
def test_products_of_packed_weights(on_arm, dtype, cols):
    """Every pattern, with 1 to 9 tokens and several numbers of outputs left over; then bitmaps without a pattern."""
    weight = matrix(7, cols, dtype)
    tokens, bias = matrix(9, cols, dtype, seed=1), matrix(1, 7, dtype, seed=2)[0]

    def products() -> Results:
        results = {}
        for n, m in PACKED_PATTERNS:
            packed = pack_scored(weight, ScoreTerms(), n, m)
            results[f"values, {n}:{m}"] = packed.values.view(torch.uint8)
            results[f"meta, {n}:{m}"] = packed.meta
            for count in (1, 2, 4, 9):
                results[f"{count} tokens, {n}:{m}"] = nm_linear(tokens[:count], packed, bias)
        for share in (0.0, 0.4, 1.0):
            packed = pack_rows(weight * (torch.arange(7 * cols).reshape(7, cols) % 10 >= 10 * share))
            results[f"unpacked rows, {share}"] = unpack_rows(packed).view(torch.uint8)
            for count in (1, 2, 4, 9):
                results[f"{count} tokens, rows, {share}"] = rows_linear(tokens[:count], packed, bias)
        return results

    compare(on_arm, products)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cols", "group"), [(96, 32), (352, 64), (1120, 128)])
def test_products_of_quantized_weights(on_arm, bits, dtype, cols, group):
    """Inputs of all magnitudes, of which some blocks are rounded to zeros and some hold NaN."""
    weight, tokens = matrix(9, cols, dtype), matrix(5, cols, dtype, seed=1)
    tokens[0] = torch.linspace(-126, 126, cols).exp2().to(dtype) * tokens[0].sign()
    tokens[1], tokens[2] = tokens[1].abs().neg(), tokens[2].clamp(min=-3.0, max=-2.9999)
    packed = {f"{n}:{m}": quantize_nm(pack_scored(weight, ScoreTerms(), n, m), bits, group) for n, m in PACKED_PATTERNS}

    def products() -> Results:
        results = {}
        for name, one in packed.items():
            results |= {f"{count} tokens, {name}": nm_linear(tokens[:count], one) for count in (1, 2, 5)}
        return results

    compare(on_arm, products)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("cols", "group"), [(1, 32), (45, 32), (352, 64), (1121, 128)])
def test_products_of_weights_that_are_not_pruned(on_arm, bits, cols, group):
    weight, tokens = matrix(9, cols, torch.bfloat16), matrix(5, cols, torch.float32, seed=1)
    packed = quantize_dense(weight, bits, group)

    def products() -> Results:
        results = {}
        for input_bits in (8, 30):
            cpu_library.use_input_bits(input_bits)
            for count in (1, 2, 5):
                results[f"{count} tokens in {input_bits} bits"] = quantized_linear(tokens[:count], packed)
        return results

    compare(on_arm, products)


def test_every_number_of_threads(on_arm):
    weight, tokens = matrix(520, 1024, torch.bfloat16), matrix(3, 1024, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            packed = pack_scored(weight, ScoreTerms(), 2, 4)
            results.append((packed.values, packed.meta, nm_linear(tokens, packed)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 49), (70, 100), (1027, 13)])
def test_gram_products_of_bf16_tokens(on_arm, request, tokens, width):
    """If the processor has products of bf16 matrices. Their sums are rounded in their own way."""
    assert cpu.has_gram_product() == (request.node.callspec.params["emulated"] == "max")
    cpu_library.use_isa("portable")
    assert not cpu.has_gram_product()
    cpu_library.use_isa("neon")
    rows = matrix(tokens, width, torch.bfloat16)
    got, wanted = gram_product(rows), gram_product_reference(rows)
    scale = wanted.diagonal().sqrt().clamp(min=1e-30)
    torch.testing.assert_close(got / scale / scale[:, None], wanted / scale / scale[:, None], rtol=0.0, atol=1e-5)
    assert torch.equal(got, got.t())
