"""Bound calls of packed layers as machine code: a repetition gives what the launcher gives for the same tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from triton.runtime.jit import JITFunction

from ace_triton import NMLinear, RowLimits, prune_linear
from ace_triton.kernels.backend import interpreting
from ace_triton.packed.dispatch import multiply
from ace_triton.packed.packed_linear import PackedLinear
from ace_triton.packed.quantized_embedding import QuantizedEmbedding
from ace_triton.packed.quantized_linear import QuantizedLinear, TiedLinear
from ace_triton.packed.rows_linear import RowsLinear
from tests.x86.executor import executed_on_x86

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")

LIMITS = RowLimits(16)
IN, OUT = 128, 24

FORMS: dict[str, Callable[[nn.Linear], PackedLinear]] = {
    "2:4": lambda layer: NMLinear.from_linear(layer, 2, 4, LIMITS),
    "2:4, 8 bits": lambda layer: NMLinear.from_linear(layer, 2, 4, LIMITS, bits=8, group=64),
    "2:4, 4 bits": lambda layer: NMLinear.from_linear(layer, 2, 4, LIMITS, bits=4, group=128),
    "dense, 8 bits": lambda layer: QuantizedLinear.from_linear(layer, 8, 128, LIMITS),
    "dense, 4 bits": lambda layer: QuantizedLinear.from_linear(layer, 4, 64, LIMITS),
    "rows": lambda layer: RowsLinear.from_linear(layer, LIMITS),
    "tied": lambda layer: TiedLinear(_embedding(layer.weight), layer.bias, LIMITS),
}


def _embedding(weight: torch.Tensor) -> QuantizedEmbedding:
    return QuantizedEmbedding.from_embedding(nn.Embedding.from_pretrained(weight.detach()), 8, 128)


@pytest.fixture
def through_jit(monkeypatch):
    """Counts launches that go through Triton's JIT; called inside :func:`executed_on_x86`, which replaces it."""

    def counted(calls: list[JITFunction]) -> list[JITFunction]:
        run = JITFunction.run
        monkeypatch.setattr(JITFunction, "run", lambda kernel, *a, **k: calls.append(kernel) or run(kernel, *a, **k))
        return calls

    return counted


@pytest.mark.parametrize(("form", "rows"), [*((form, 1) for form in FORMS), ("2:4, 8 bits", 11)])
def test_a_repetition_gives_the_same(form, rows, through_jit):
    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT, dtype=torch.bfloat16).requires_grad_(False)
    prune_linear(dense, None, "magnitude")
    layer = FORMS[form](dense)
    tokens = torch.randn(3, rows, IN).bfloat16()
    with executed_on_x86(1):
        expected = [multiply(some, layer.packed, layer.bias, LIMITS) for some in tokens]
        calls = through_jit([])
        first = layer(tokens[0])
        launches = len(calls)
        got = [first, layer(tokens[1]), layer(tokens[2][None])[0]]
    assert launches > 0
    assert len(calls) == 2 * launches, "the third call has another shape, the second is bound"
    for some, outputs, wanted in zip(tokens, got, expected, strict=True):
        assert torch.equal(outputs, wanted)
        exact = some.double() @ layer.unpack().double().t() + layer.bias.double()
        torch.testing.assert_close(outputs.double(), exact, rtol=2e-2, atol=2e-2)
