"""select_nm and select_rows as machine code, at the sizes of real layers, against their references bit for bit.

The executor runs all kernels, with the blocks that the launchers choose for a warp of a few lanes (see
:func:`tests.x86.executor.executed_on_x86`). One test uses the blocks of a GPU. Each kernel takes seconds to compile, so
grids of three parameters are pairwise covers.
"""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm, select_nm_reference
from ace_triton.kernels.select_rows import select_rows, select_rows_reference
from tests.pairwise import pairwise
from tests.x86.executor import executed_on_x86

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
METRICS = ((), ("scale",), ("row",), ("row", "col", "scale", "coupling"))


def make_weight(rows: int, cols: int, dtype: torch.dtype, ties: bool = False) -> torch.Tensor:
    """A weight with all kinds of numbers, or one with few distinct values."""
    generator = torch.Generator().manual_seed(rows * cols)
    if ties:
        return torch.randint(-2, 3, (rows, cols), generator=generator).to(dtype)
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    kind = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, kind.tiny, kind.tiny / 4, -kind.max, torch.inf], dtype=torch.float64).to(dtype)
    places = torch.randint(rows * cols, (max(6, rows * cols // 8),), generator=generator)
    weight.view(-1)[places] = special[torch.arange(len(places)) % len(special)]
    return weight


def make_terms(rows: int, cols: int, names: tuple[str, ...], power: int = 1) -> ScoreTerms:
    generator = torch.Generator().manual_seed(7)
    shapes = {"row": (rows,), "col": (cols,), "scale": (cols,), "coupling": (rows, cols)}
    return ScoreTerms(**{name: torch.rand(shapes[name], generator=generator) + 0.1 for name in names}, power=power)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def check_nm(weight: torch.Tensor, terms: ScoreTerms, n: int, m: int, lanes: int = 1, **options: str) -> None:
    expected = select_nm_reference(weight.clone(), terms, n, m, **options)
    with executed_on_x86(lanes):
        got = select_nm(weight, terms, n, m, **options)
    assert torch.equal(bits_of(got), bits_of(expected))


def check_rows(weight: torch.Tensor, terms: ScoreTerms, k: int, lanes: int = 1, **options: str) -> None:
    expected = select_rows_reference(weight.clone(), terms, k, **options)
    with executed_on_x86(lanes):
        got = select_rows(weight, terms, k, **options)
    assert torch.equal(bits_of(got), bits_of(expected))


@pytest.mark.parametrize(("shape", "dtype", "names"), pairwise([(576, 1536), (1536, 576), (33, 20)], DTYPES, METRICS))
def test_2_4_by_every_metric(shape, dtype, names):
    check_nm(make_weight(*shape, dtype), make_terms(*shape, names), 2, 4)


@pytest.mark.parametrize(
    ("dtype", "axis", "pattern"),
    pairwise([torch.bfloat16, torch.float32], ["in", "out"], [(1, 2), (1, 4), (3, 4), (4, 8), (8, 16)]),
)
def test_other_patterns(dtype, axis, pattern):
    n, m = pattern
    check_nm(make_weight(96, 160, dtype, ties=m == 8), make_terms(96, 160, ("scale",), power=2), n, m, axis=axis)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_groups_of_32(axis):
    check_nm(make_weight(64, 96, torch.bfloat16), make_terms(64, 96, ("scale",)), 5, 32, lanes=1, axis=axis)


@pytest.mark.parametrize(
    ("groups", "axis", "output"),
    pairwise([(4, torch.float16), (4, torch.float32), (16, torch.bfloat16)], ["in", "out"], ["mask", "bits"]),
)
def test_masks_and_bits(groups, axis, output):
    m, dtype = groups
    rows, cols = (37, 48) if axis == "in" else (48, 37)
    check_nm(make_weight(rows, cols, dtype, ties=True), make_terms(rows, cols, ()), m // 2, m, axis=axis, output=output)


def test_exactly_n_survive_scores_that_are_not_numbers():
    weight = make_weight(64, 64, torch.bfloat16)
    weight[::3, ::5] = torch.nan
    weight[1::3, ::2] = torch.inf
    terms = ScoreTerms(scale=torch.tensor([0.0, -0.0, 1.0, 2.0]).repeat(16))
    for m in (4, 16):
        with executed_on_x86(1):
            mask = select_nm(weight, terms, m // 2, m, output="mask")
        assert (mask.view(64, -1, m).sum(2) == m // 2).all()


@pytest.mark.parametrize("axis", ["in", "out"])
def test_strided_rows_leave_their_neighbours_alone(axis):
    wide = make_weight(64, 112, torch.bfloat16)
    before = wide.clone()
    check_nm(wide[:, 16:80], make_terms(64, 64, ("scale",)), 2, 4, axis=axis)
    assert torch.equal(bits_of(wide[:, :16]), bits_of(before[:, :16]))
    assert torch.equal(bits_of(wide[:, 80:]), bits_of(before[:, 80:]))


def test_large_layer_in_the_blocks_of_a_gpu():
    """Programs of several tiles each, and the last ones end inside a tile."""
    rows, cols = 2052, 11008
    weight = make_weight(rows, cols, torch.bfloat16)
    scale = torch.rand(cols) + 0.1
    groups = (weight.float().abs() * scale).view(rows, -1, 4)
    rank = sum(
        (groups > other) | ((groups == other) & (torch.arange(4) > k)) for k, other in enumerate(groups.split(1, 2))
    )
    expected = torch.where(rank.view(rows, cols) >= 2, bits_of(weight), 0)
    with executed_on_x86(lanes=32):
        select_nm(weight, ScoreTerms(scale=scale), 2, 4)
    assert torch.equal(bits_of(weight), expected)


# One word per thread, unaligned and aligned; two parts in several warps (288 weights, nine words).
@pytest.mark.parametrize(
    ("cols", "dtype"), [*((20, dtype) for dtype in DTYPES), (64, torch.float32), (288, torch.bfloat16)]
)
def test_rows_on_chip(cols, dtype):
    terms = make_terms(40, cols, ("row", "col", "scale"))
    check_rows(make_weight(40, cols, dtype), terms, cols // 2)
    level = make_terms(40, cols, ("row", "col", "scale"))
    for vector in level.tensors.values():
        vector.fill_(1.0)
    check_rows(make_weight(40, cols, dtype, ties=True), level, cols // 2)


@pytest.mark.parametrize("output", ["weight", "mask", "bits"])
@pytest.mark.parametrize(("cols", "k"), [(64, 32), (33, 33)])
def test_outputs_of_rows(output, cols, k):
    check_rows(
        make_weight(9, cols, torch.bfloat16, ties=True), ScoreTerms(), k, lanes=8 if cols == 33 else 1, output=output
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "ties"),
    [((576, 1536), torch.bfloat16, False), ((1536, 576), torch.float32, True), ((96, 33), torch.float16, True)],
)
def test_whole_layer(shape, dtype, ties):
    weight = make_weight(*shape, dtype, ties)
    check_rows(weight, make_terms(*shape, ("row", "col", "scale")), weight.numel() // 2, scope="layer")


@pytest.mark.parametrize("output", ["weight", "mask", "bits"])
def test_rows_too_long_for_a_program(output):
    weight = make_weight(5, 2000, torch.float16)
    check_rows(weight, make_terms(5, 2000, ("scale",)), 700, output=output)
