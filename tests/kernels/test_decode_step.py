"""One block of the compiled decoding step beside plain torch, with enough work for two threads."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from ace_triton.kernels import cpu_library
from ace_triton.kernels.decode_step import Block, DecodeStep, Linear, Sizes
from ace_triton.kernels.errors import ArgumentError
from ace_triton.kernels.packed_dense import dequantize_dense, quantize_dense

pytestmark = pytest.mark.skipif(not cpu_library.available(), reason="no CPU library")

HEADS, KV_HEADS, SIZE, ROTARY, HIDDEN, GATES, VOCABULARY = 10, 2, 24, 16, 72, 900, 37
LENGTH = 1201


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float32, device="cpu") / shape[-1] ** 0.5


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def made(capacity: int = LENGTH + 1):
    torch.manual_seed(0)
    shapes = [(HEADS * SIZE, HIDDEN), (KV_HEADS * SIZE, HIDDEN), (KV_HEADS * SIZE, HIDDEN)]
    inputs = [Linear(normal(*shape), normal(shape[0])) for shape in shapes]
    output, down = Linear(normal(HIDDEN, HEADS * SIZE)), Linear(normal(HIDDEN, GATES), normal(HIDDEN))
    gates = [Linear(normal(GATES, HIDDEN)), Linear(normal(GATES, HIDDEN))]
    norms = [1 + normal(HIDDEN) for _ in range(2)]
    block = Block(*norms, inputs, output, gates, down, query_norm=1 + normal(SIZE), key_norm=1 + normal(SIZE))
    sizes = Sizes(HIDDEN, HEADS, KV_HEADS, SIZE, ROTARY, GATES, eps=1e-5, scaling=0.7, activation="silu")
    cosines, sines = normal(capacity, ROTARY), normal(capacity, ROTARY)
    norm, head = 1 + normal(HIDDEN), Linear(normal(VOCABULARY, HIDDEN))
    return block, norm, head, sizes, cosines, sines


def apply(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.weight, layer.bias)


def turned(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    part, rest = x[:, :ROTARY], x[:, ROTARY:]
    half = torch.cat([-part[:, ROTARY // 2 :], part[:, : ROTARY // 2]], -1)
    return torch.cat([part * cosines + half * sines, rest], -1)


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_a_block_is_that_of_torch_for_any_number_of_threads(scale):
    """A large scale makes scores that differ by hundreds, so that the softmax must follow the largest."""
    block, norm, head, sizes, cosines, sines = made()
    keys, values = scale * normal(KV_HEADS, LENGTH, SIZE), normal(KV_HEADS, LENGTH, SIZE)
    hidden = normal(HIDDEN)
    x = rms(hidden, block.attention_norm)
    query, key, value = (apply(layer, x).view(-1, SIZE) for layer in block.inputs)
    query = turned(rms(query, block.query_norm), cosines[-1], sines[-1])
    key = turned(rms(key, block.key_norm), cosines[-1], sines[-1])
    attended = scaled_dot_product_attention(
        query[None, :, None],
        torch.cat([keys, key[:, None]], 1)[None],
        torch.cat([values, value[:, None]], 1)[None],
        scale=0.7,
        enable_gqa=True,
    )
    wanted = hidden + apply(block.output, attended.flatten())
    x = rms(wanted, block.feed_norm)
    gate, up = (apply(layer, x) for layer in block.gates)
    wanted = apply(head, rms(wanted + apply(block.down, silu(gate) * up), norm))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            step = DecodeStep([block], norm, head, sizes)
            cache = step.cache(cosines, sines)
            cache.fill([keys], [values])
            found.append(step([cache], hidden[None]).clone())
            products, attention, everything = step.seconds
            assert 0 < products + attention < everything
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[0][0], wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("input_bits", [30, 8])
def test_layers_that_share_inputs_may_be_quantized_in_different_ways(input_bits):
    """Each kind reads rounded inputs in its own blocks and order."""
    torch.manual_seed(0)
    size = 192
    ways = [(4, 128), (8, 128), (4, 32), (8, 32), (4, 64)]
    packed = [quantize_dense(normal(size, size), bits, group) for bits, group in ways]
    norm, plain = torch.ones(size), normal(size, size)
    sizes = Sizes(size, 1, 1, size, size, intermediate=size, eps=1e-5, scaling=0.1, activation="silu")
    hidden = torch.randn(1, size)

    def logits(layers: list[Linear]) -> torch.Tensor:
        block = Block(norm, norm, layers[:3], Linear(plain), layers[3:], Linear(plain))
        step = DecodeStep([block], norm, Linear(plain), sizes)
        return step([step.cache(torch.ones(2, size), torch.zeros(2, size))], hidden).clone()

    cpu_library.use_input_bits(input_bits)
    got = logits([Linear(one) for one in packed])
    cpu_library.use_input_bits(30)
    expected = logits([Linear(dequantize_dense(one, torch.float32)) for one in packed])
    torch.testing.assert_close(got, expected, rtol=0, atol={30: 1e-5, 8: 0.05}[input_bits])


def test_what_does_not_fit_is_refused():
    block, norm, head, sizes, cosines, sines = made(20)
    step = DecodeStep([block], norm, head, sizes)
    cache, other = (step.cache(cosines, sines) for _ in range(2))
    with pytest.raises(ArgumentError, match="at most 20 tokens"):
        cache.fill([normal(KV_HEADS, 21, SIZE)], [normal(KV_HEADS, 21, SIZE)])
    cache.fill([normal(KV_HEADS, 20, SIZE)], [normal(KV_HEADS, 20, SIZE)])
    with pytest.raises(ArgumentError, match="the cache is full"):
        step([other, cache], normal(2, HIDDEN))
    for caches in ([], [other, other]):
        with pytest.raises(ArgumentError, match="one cache of each text"):
            step(caches, normal(2, HIDDEN))
    with pytest.raises(ArgumentError, match="hidden must be"):
        step([other], normal(2, HIDDEN))
    with pytest.raises(ArgumentError, match="another decoder"):
        step([DecodeStep([block] * 2, norm, head, sizes).cache(cosines, sines)], normal(1, HIDDEN))
    assert other.length == 0
    with pytest.raises(ArgumentError, match="must have 72 inputs, got 71"):
        DecodeStep([block], norm, Linear(normal(VOCABULARY, 71)), sizes)
    short = [*block.inputs[:2], Linear(normal(KV_HEADS * SIZE - 1, HIDDEN))]
    misfit = Block(norm, norm, short, block.output, block.gates, block.down)
    with pytest.raises(ArgumentError, match="must have 336 outputs, got 335"):
        DecodeStep([misfit], norm, head, sizes)
