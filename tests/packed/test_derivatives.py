"""Derivatives through a packed layer are those of the dense one, in both modes and under torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from ace_triton import NMLinear, prune_linear


@pytest.fixture
def pair() -> tuple[nn.Linear, NMLinear]:
    """A pruned layer, dense and packed."""
    torch.manual_seed(0)
    dense = nn.Linear(32, 24)
    prune_linear(dense, method="magnitude")
    return dense, NMLinear.from_linear(dense, 2, 4)


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 32), (2, 3, 32), (32,)])
def test_outputs_may_be_changed_in_place(pair, shape):
    gradients = []
    for layer in pair:
        tokens = torch.ones(shape, requires_grad=True)
        outputs = layer(tokens)
        outputs += 1
        outputs.mul_(2).square().sum().backward()
        gradients.append(tokens.grad)
    same(*gradients)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("of", ["tokens", "bias", "both"])
def test_tangents_go_through(pair, recorded, of):
    dense, packed = pair
    tokens, moved = torch.randn(3, 32), torch.randn(3, 32)
    offset = torch.randn(24)
    with forward_ad.dual_level(), torch.set_grad_enabled(recorded):
        given = tokens if of == "bias" else forward_ad.make_dual(tokens, moved)
        bias = dense.bias.detach() if of == "tokens" else forward_ad.make_dual(dense.bias.detach(), offset)
        outputs = torch.func.functional_call(packed, {"bias": bias}, (given,))
        value, tangent = forward_ad.unpack_dual(outputs)
    same(value, dense(tokens))
    expected = torch.zeros(3, 24) if of == "bias" else moved @ dense.weight.t()
    same(tangent, expected if of == "tokens" else expected + offset)


@pytest.mark.parametrize(
    "transform",
    [
        lambda layer, x: torch.func.jvp(layer, (x,), (x * 2,)),
        lambda layer, x: torch.func.vjp(layer, x)[1](torch.ones(4, 24))[0],
        lambda layer, x: torch.func.grad(lambda y: layer(y).pow(3).sum())(x),
        lambda layer, x: torch.func.jacrev(layer)(x[0]),
        lambda layer, x: torch.func.jacfwd(layer)(x[0]),
        lambda layer, x: torch.func.hessian(lambda y: layer(y).pow(3).sum())(x[0]),
        lambda layer, x: torch.vmap(layer)(x),
        lambda layer, x: torch.vmap(layer, in_dims=1)(x.unflatten(1, (1, 32)).expand(4, 5, 32)),
    ],
    ids=["jvp", "vjp", "grad", "jacrev", "jacfwd", "hessian", "vmap", "vmap, second dimension"],
)
def test_transforms_of_torch_func(pair, transform):
    tokens = torch.randn(4, 32)
    expected, got = (transform(layer, tokens) for layer in pair)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_vmap_needs_no_gradients(pair, grad):
    """Of tokens, of tokens by a layer without parameters, and of biases."""
    dense, packed = pair
    tokens, biases = torch.randn(4, 5, 32), torch.randn(3, 24)
    with torch.set_grad_enabled(grad):
        same(torch.vmap(packed)(tokens), dense(tokens))
        found = torch.vmap(lambda bias: torch.func.functional_call(packed, {"bias": bias}, (tokens,)))(biases)
        same(found, dense(tokens) - dense.bias + biases[:, None, None])
        packed.bias = None
        same(torch.vmap(torch.vmap(packed))(tokens), dense(tokens) - dense.bias)


def test_a_gradient_can_be_differentiated_again(pair):
    twice = []
    for layer in pair:
        tokens = torch.ones(3, 32, requires_grad=True)
        (once,) = torch.autograd.grad(layer(tokens).pow(3).sum(), tokens, create_graph=True)
        twice.append(torch.autograd.grad(once.square().sum(), tokens)[0])
    torch.testing.assert_close(*twice, rtol=1e-4, atol=1e-3)


def test_a_weight_written_before_the_backward_pass_is_noticed(pair):
    _, packed = pair
    outputs = packed(torch.ones(3, 32, requires_grad=True)).sum()
    packed.values.mul_(2)
    with pytest.raises(RuntimeError, match="written between the forward and the backward pass"):
        outputs.backward()


@pytest.mark.parametrize("recorded", [True, False])
def test_tokens_that_negate_when_they_are_read(pair, recorded):
    tokens = torch.randn(3, 32, dtype=torch.complex64).conj().imag
    assert tokens.is_neg()
    with torch.set_grad_enabled(recorded):
        same(pair[1](tokens), pair[0](tokens))


def test_a_weight_that_negates_when_it_is_read_is_packed_as_it_reads(pair):
    dense, packed = pair
    negated = nn.Linear(32, 24)
    negated.weight = nn.Parameter(torch._neg_view(-dense.weight.detach()))
    assert torch.equal(NMLinear.from_linear(negated, 2, 4).unpack(), packed.unpack())
