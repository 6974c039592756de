"""A pairwise cover leaves out cells of a grid, but no pair of values."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.pairwise import pairwise


@pytest.mark.parametrize(("sizes", "most"), [((3, 2), 6), ((3, 3, 3), 10), ((3, 3, 4), 13), ((3, 4, 2, 5), 22)])
def test_every_two_values_of_two_axes_meet(sizes, most):
    axes = [[f"{name}{i}" for i in range(size)] for name, size in zip("abcd", sizes, strict=False)]
    cells = pairwise(*axes)
    assert len(set(cells)) == len(cells) <= most
    for (i, one), (j, other) in combinations(enumerate(axes), 2):
        assert {(cell[i], cell[j]) for cell in cells} == set(product(one, other))
