import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton import Sparsity, prune_linear


@pytest.mark.parametrize(
    ("pattern", "n", "m", "fraction"),
    [
        ("2:4", 2, 4, 0.5),
        (" 1 : 4 ", 1, 4, 0.75),
        ("4:8", 4, 8, 0.5),
        (0.5, None, None, 0.5),
        ("0.3", None, None, 0.3),
        ("70%", None, None, 0.7),
        (0, None, None, 0.0),
    ],
)
def test_patterns(pattern, n, m, fraction):
    sparsity = Sparsity(pattern)
    assert (sparsity.n, sparsity.m) == (n, m)
    assert sparsity.fraction == pytest.approx(fraction)
    assert Sparsity.of(sparsity) is sparsity


@pytest.mark.parametrize(
    "pattern", ["2:3", "4:4", "0:4", "5:4", "2:64", "half", "", 1.0, -0.1, 1.5, None, True, "120%", "1/2%", "nan%"]
)
def test_invalid_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match=r"n:m|pruned fraction"):
        Sparsity(pattern)


def test_axis_and_scope_are_checked():
    with pytest.raises(ValueError, match="axis"):
        Sparsity("2:4", axis="rows")
    with pytest.raises(ValueError, match="scope"):
        Sparsity(0.5, scope="model")
    with pytest.raises(ValueError, match="scope 'layer'"):
        Sparsity("2:4", scope="layer")


@given(percent=st.integers(0, 99), size=st.integers(1, 100_000))
def test_a_fraction_is_the_decimal_that_was_written(percent, size):
    lost = percent * size // 100
    for pattern in (percent / 100, f"{percent}%", f"0.{percent:02}"):
        assert Sparsity(pattern).kept_of(size) == size - lost


@pytest.mark.parametrize(("fraction", "lost"), [(0.29, 29), (0.57, 57), (0.58, 58), ("28.7%", 28), (0.2899999999, 28)])
def test_a_decimal_below_its_float_loses_no_weight(fraction, lost):
    assert Sparsity(fraction).kept_of(100) == 100 - lost
    layer = torch.nn.Linear(100, 4)
    assert prune_linear(layer, None, "magnitude", fraction).kept == 4 * (100 - lost)
    assert ((layer.weight == 0).sum(1) == lost).all()


def test_a_fraction_prunes_as_many_as_the_published_code():
    assert Sparsity(0.5).kept_of(577) == 577 - 288
    assert Sparsity(0.0).kept_of(10) == 10
    assert str(Sparsity("2:4")) == "2:4"
    assert str(Sparsity(0.5)) == "0.5"
    assert Sparsity(0.5) == Sparsity("0.5") == Sparsity("50%") != Sparsity(0.5, scope="layer")
