"""load_state_dict of quantized layers: what no quantization gives is refused, and nothing of the layer changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ace_triton import NMLinear, QuantizedEmbedding, QuantizedLinear, prune_linear

BYTE = {8: 0x80, 4: 0x18}
"""A byte with the number -128 in 8 bits, and with -8 in 4 bits."""


def nm_linear(bits: int) -> nn.Module:
    layer = nn.Linear(96, 23)
    prune_linear(layer, method="magnitude", sparsity="8:16")
    return NMLinear.from_linear(layer, 8, 16, bits=bits, group=32)


def dense_linear(bits: int) -> nn.Module:
    return QuantizedLinear.from_linear(nn.Linear(95, 23), bits, 32)


def embedding(bits: int) -> nn.Module:
    return QuantizedEmbedding.from_embedding(nn.Embedding(7, 33), bits, 32)


def damaged(tensor: torch.Tensor, change) -> torch.Tensor:
    tensor = tensor.clone()
    change(tensor)
    return tensor


@pytest.fixture(params=[8, 4])
def bits(request) -> int:
    return request.param


@pytest.mark.parametrize("made", [nm_linear, dense_linear, embedding])
@pytest.mark.parametrize("assign", [False, True])
def test_values_that_no_quantization_gives_are_refused(made, bits, assign):
    model = nn.Sequential(made(bits))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changes = {
        "values": (lambda t: t.view(torch.uint8)[3:4, 2:3].fill_(BYTE[bits]), "a number that no quantization gives"),
        "absmax": (lambda t: t[3, 0].fill_(float("nan")), "NaN, infinity or a negative number"),
    }
    for name, (change, message) in changes.items():
        state = before | {f"0.{name}": damaged(before[f"0.{name}"], change)}
        with pytest.raises(RuntimeError, match=rf"0: .*{message}: the tensors are damaged; pack the model again"):
            model.load_state_dict(state, assign=assign)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("made", [nm_linear, dense_linear, embedding])
def test_sound_values_are_loaded(made, bits):
    torch.manual_seed(0)
    one, other = made(bits), made(bits)
    one.load_state_dict(other.state_dict())
    assert all(torch.equal(tensor, one.state_dict()[name]) for name, tensor in other.state_dict().items())
    empty = made(bits).to("meta")
    empty.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(empty.values, other.values)


@pytest.mark.parametrize("made", [nm_linear, dense_linear, embedding])
def test_other_bits_and_other_shapes_are_named(made):
    with pytest.raises(RuntimeError, match="load the weights into a layer with the same bits"):
        made(8).load_state_dict(made(4).state_dict())
    layer = made(8)
    state = layer.state_dict()
    state["values"] = state["values"][:-1]
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("made", [nm_linear, dense_linear, embedding])
def test_scales_that_the_layers_dtype_cannot_hold_are_refused_unless_they_are_assigned(made):
    layer = made(8).half()
    state = layer.state_dict()
    state["absmax"] = state["absmax"].float() * 1e7
    with pytest.raises(
        RuntimeError, match=r"absmax exceed the range of torch\.float16: load them into a layer in .*32"
    ):
        layer.load_state_dict(state)
    assert bool(layer.absmax.isfinite().all())
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer.absmax, state["absmax"])


@pytest.mark.parametrize("made", [nm_linear, dense_linear, embedding])
@pytest.mark.parametrize("assign", [False, True])
def test_scales_in_other_dtypes_are_refused(made, assign):
    layer = made(8)
    for dtype in (torch.int32, torch.float64, torch.complex64):
        state = layer.state_dict() | {"absmax": layer.absmax.to(dtype)}
        with pytest.raises(RuntimeError, match=rf"absmax are {dtype}, but must be float32, float16 or bfloat16"):
            layer.load_state_dict(state, assign=assign)


@pytest.mark.parametrize("made", [nm_linear, dense_linear, embedding])
@pytest.mark.parametrize("given", [None, [1, 2], "text"])
def test_what_is_no_tensor_is_reported_by_torch(made, given):
    layer = made(4)
    for name in set(layer.state_dict()) - {"bias"}:
        with pytest.raises(RuntimeError, match=f"{name}.*expected torch.Tensor or Tensor-like object"):
            layer.load_state_dict(layer.state_dict() | {name: given})
