"""Products with quantized weights whose inputs are rounded to 8 bits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ace_triton.kernels import cpu_library
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.decode_step import Block, DecodeStep, Linear, Sizes
from ace_triton.kernels.errors import ArgumentError
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import pack_scored
from ace_triton.kernels.packed_dense import dequantize_dense, quantize_dense
from ace_triton.kernels.quantize_nm import dequantize_nm, quantize_nm
from ace_triton.kernels.quantized_linear import quantized_linear
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.unpack_nm import unpack_nm_reference

pytestmark = pytest.mark.skipif(interpreting() or not cpu_library.available(), reason="for the compiled library")


@pytest.fixture
def eight_bits() -> Iterator[None]:
    cpu_library.use_input_bits(8)
    yield
    cpu_library.use_input_bits(30)


def instruction_sets() -> Iterator[str]:
    """Each instruction set that runs here, while it is in use."""
    in_use = cpu_library.isa()
    try:
        for isa in cpu_library.ISAS:
            try:
                cpu_library.use_isa(isa)
            except ValueError:
                continue
            yield isa
    finally:
        cpu_library.use_isa(in_use)


def rounded(tokens: torch.Tensor) -> torch.Tensor:
    """The tokens in 8 bits: integers up to 127, and a scale for every 32 inputs."""
    padded = torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % 32)).view(len(tokens), -1, 32)
    largest = padded.abs().amax(-1, keepdim=True)
    steps = torch.where(largest > 0, (padded * (127 / largest)).round(), 0.0)
    return (steps.double() * (largest / 127)).flatten(1)[:, : tokens.shape[1]]


def weight_of(pattern, rows, cols, bits, group):
    """A quantized weight, its product, and its dense copy in fp64."""
    weight = torch.randn(rows, cols)
    if pattern is None:
        packed = quantize_dense(weight, bits, group)
        return packed, quantized_linear, dequantize_dense(packed, torch.float32).double()
    packed = quantize_nm(pack_scored(weight, ScoreTerms(), *pattern), bits, group)
    return packed, nm_linear, unpack_nm_reference(dequantize_nm(packed, torch.float32)).double()


@pytest.mark.usefixtures("eight_bits")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("pattern", "rows", "cols", "group"),
    [
        (None, 67, 289, 32),
        (None, 5, 1, 128),
        (None, 9, 640, 256),
        (None, 67, 289, 64),
        (None, 12, 421, 128),
        ((2, 4), 13, 352, 64),
        ((8, 16), 67, 288, 128),
        ((7, 16), 9, 48, 32),
        ((16, 32), 12, 512, 128),
        ((5, 32), 9, 288, 96),
        ((31, 32), 9, 288, 128),
    ],
)
def test_products_are_those_of_rounded_inputs_on_every_instruction_set(bits, pattern, rows, cols, group):
    torch.manual_seed(0)
    packed, product, dense = weight_of(pattern, rows, cols, bits, group)
    tokens, bias = torch.randn(11, cols), torch.randn(rows)
    tokens[:, ::50] *= 1e3
    tokens[3] = 0
    results = []
    for _ in instruction_sets():
        results += [product(tokens, packed, bias), torch.cat([product(token[None], packed, bias) for token in tokens])]
    expected = rounded(tokens) @ dense.t() + bias
    allowed = 1e-6 * (rounded(tokens).abs() @ dense.abs().t() + bias.abs()) + 1e-6
    assert bool(((results[0] - expected).abs() <= allowed).all())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("eight_bits")
@pytest.mark.parametrize("pattern", [None, (8, 16)])
def test_inputs_that_are_not_finite_give_nan_and_tiny_ones_count_as_zeros(pattern):
    torch.manual_seed(0)
    packed, product, _ = weight_of(pattern, 6, 64, 8, 32)
    tokens = torch.full((3, 64), 1e-35)
    tokens[1, 40], tokens[2, 3] = torch.inf, torch.nan
    for _ in instruction_sets():
        outputs = product(tokens, packed)
        assert bool((outputs[0] == 0).all())
        assert bool(outputs[1:].isnan().all())


@pytest.mark.parametrize("input_bits", cpu_library.INPUT_BITS)
@pytest.mark.parametrize(("cols", "group"), [(32, 32), (320, 64), (544, 128), (800, 32), (1056, 96)])
@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 8), (3, 4)])
def test_rows_of_any_length_agree_on_every_instruction_set(pattern, cols, group, input_bits):
    """Whole registers of inputs, pairs of blocks, and what is left of both; the last of 17 tokens is alone."""
    torch.manual_seed(0)
    tokens = torch.randn(17, cols)
    weights = [weight_of(pattern, 13, cols, bits, group)[:2] for bits in (8, 4)]
    results = []
    cpu_library.use_input_bits(input_bits)
    try:
        for _ in instruction_sets():
            for given in (tokens, tokens[-1:], tokens[:2]):
                results.append(torch.cat([product(given, packed) for packed, product in weights], 1))
    finally:
        cpu_library.use_input_bits(30)
    assert len(results) > 3
    for k in range(0, len(results), 3):
        assert torch.equal(results[k], results[0])
        assert torch.equal(results[k + 1], results[0][-1:])
        assert torch.equal(results[k + 2], results[0][:2])


def test_thirty_bits_are_the_default_and_other_numbers_are_refused():
    assert cpu_library.input_bits() == cpu_library.INPUT_BITS[0] == 30
    for bits in (16, 0, True, None, 8.0, 30.0, "8", torch.tensor(8)):
        with pytest.raises(ArgumentError, match="input bits must be 30 or 8; got"):
            cpu_library.use_input_bits(bits)
    assert cpu_library.input_bits() == 30


@contextmanager
def changing(use: Callable[[Any], None], *choices: Any) -> Iterator[None]:
    """Within it, another thread calls ``use`` with each choice in turn; the last one holds at the end."""
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for choice in choices:
                use(choice)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        use(choices[-1])


def assert_one_number_of_bits(compute: Callable[[], torch.Tensor]) -> None:
    """For some tenths of a second, every result is that of 8 bits or that of 30 while another thread changes them."""
    allowed = []
    for bits in (8, 30):
        cpu_library.use_input_bits(bits)
        allowed.append(compute())
    assert not torch.equal(*allowed)
    with changing(cpu_library.use_input_bits, 8, 30):
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            result = compute()
            assert any(torch.equal(result, one) for one in allowed)


def test_a_product_has_one_number_of_bits_while_another_thread_changes_it():
    torch.manual_seed(0)
    packed, product, _ = weight_of(None, 8, 4096, 8, 32)
    tokens = torch.randn(64, 4096)
    assert_one_number_of_bits(lambda: product(tokens, packed))


@pytest.mark.parametrize("bits", [30, 8])
def test_a_product_has_one_instruction_set_while_another_thread_changes_it(bits):
    """Instruction sets order rounded inputs in their own ways, so a product by two of them would be wrong."""
    torch.manual_seed(0)
    packed, product, _ = weight_of(None, 8, 4096, 4, 128)
    tokens = torch.randn(64, 4096)
    cpu_library.use_input_bits(bits)
    expected = product(tokens, packed)
    with changing(cpu_library.use_isa, "portable", cpu_library.isa()):
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            assert torch.equal(product(tokens, packed), expected)
    cpu_library.use_input_bits(30)


def test_a_decoding_step_has_one_number_of_bits_while_another_thread_changes_it():
    torch.manual_seed(0)
    size = 64

    def linear(rows: int, cols: int) -> Linear:
        return Linear(quantize_dense(torch.randn(rows, cols) / cols**0.5, 8, 32))

    ones, earlier = torch.ones(size), torch.randn(1, 1, size)
    block = Block(
        ones, ones, [linear(3 * size, size)], linear(size, size), [linear(8 * size, size)], linear(size, 4 * size)
    )
    sizes = Sizes(size, 1, 1, size, size, intermediate=4 * size, eps=1e-5, scaling=1.0, activation="silu")
    step = DecodeStep([block] * 10, ones, linear(size, size), sizes)
    cache = step.cache(torch.ones(2, size), torch.zeros(2, size))
    hidden = torch.randn(size)

    def compute() -> torch.Tensor:
        cache.fill([earlier] * 10, [earlier] * 10)
        return step([cache], hidden[None]).clone()

    assert_one_number_of_bits(compute)
