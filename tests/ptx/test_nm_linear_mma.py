"""The kernel for sparse matrix units as PTX: what the compiled kernel gives each lane, through the instruction's model.

Triton promises no layout for tensors, so this is what shows that element k of the operands lies in thread k.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ace_triton.kernels import launch_packed
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.nm_linear_mma import fragments_of, nm_linear_mma
from ace_triton.kernels.pack_nm import pack_nm
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from tests.ptx.executor import executed_as_ptx

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")


@pytest.mark.parametrize(
    ("target", "dtype", "shape", "n_tokens", "tiles"),
    [
        ("sm_80", torch.bfloat16, (21, 256), 1, {}),  # all spans are inside
        ("sm_90", torch.float16, (37, 1088), 11, {"row_tiles": 2}),  # two trips, and spans past the last one
        ("sm_100", torch.bfloat16, (16, 128), 20, {"token_tiles": 2}),  # more tokens than a program takes
    ],
)
def test_equals_the_dense_product(monkeypatch, target, dtype, shape, n_tokens, tiles):
    plan = launch_packed.nm_linear_mma
    monkeypatch.setattr(launch_packed, "nm_linear_mma", lambda *size: replace(plan(*size), **tiles))
    generator = torch.Generator().manual_seed(0)

    def integers(*size: int) -> torch.Tensor:
        return torch.randint(-3, 4, size, generator=generator).to(dtype)

    weight = select_nm(integers(*shape), ScoreTerms(), 2, 4)
    packed, bias = pack_nm(weight, 2, 4), integers(shape[0])
    tokens = integers(n_tokens, shape[1] + 1)[:, 1:]
    fragments = fragments_of(packed)
    with executed_as_ptx(target) as ran:
        outputs = nm_linear_mma(tokens, packed, fragments, bias)
    assert ran == ["_mma_body"]
    assert torch.equal(outputs, (tokens.float() @ weight.float().t() + bias.float()).to(dtype))
