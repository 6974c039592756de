import pytest
import torch

from ace_triton import RowLimits
from ace_triton.packed.bench import LayerKind, LayerTimes, RowTimes, bench_layer, best_limits, totals


def times(rows, dense, packed, unpacked, semi_structured=None, product="packed", **others) -> RowTimes:
    found = {"packed": packed, "dense": unpacked, "semi_structured": semi_structured, **others}
    return RowTimes(rows, dense, {name: spent for name, spent in found.items() if spent is not None}, product)


def test_limits_that_fit():
    entries = [times(64, 2, 9, 5), times(1, 2, 1, 3), times(16, 2, 2, 3), times(256, 3, 1, 4)]
    assert best_limits(entries) == RowLimits(16)
    entries = [times(1, 2, 1, 3, 2), times(16, 2, 4, 5, 3), times(64, 2, 9, 5, 1)]
    assert best_limits(entries) == RowLimits(1, 16)
    assert best_limits([times(1, 2, 3, 1)]) == RowLimits(0)


def test_a_difference_within_the_noise_decides_nothing():
    entries = [times(1, 2, 1.01, 1.0), times(4, 2, 1.0, 1.2), times(8, 2, 1.5, 1.2)]
    assert best_limits(entries) == RowLimits(4)
    assert [entry.fits for entry in entries] == [True, True, False]


def test_what_a_layer_takes_and_whether_it_loses():
    assert times(1, 2.0, 1.0, 9.0).taken == 1.0
    assert not times(1, 2.0, 1.0, 9.0).loses
    dense = times(1, 2.0, 1.0, 9.0, product="dense")
    assert (dense.taken, dense.loses) == (9.0, True)
    assert times(1, 2.0, 1.0, 9.0, 1.5, product="semi_structured").taken == 1.5


def test_totals_count_every_layer():
    layers = [
        LayerTimes(LayerKind((4, 4), 2, 4, torch.float32, count), "cpu", 1, 1, {}, (times(1, dense, 1.0, 9.0),))
        for count, dense in ((3, 2.0), (5, 4.0))
    ]
    (total,) = totals(layers)
    assert (total.rows, total.dense, total.taken) == (1, 26.0, 8.0)


@pytest.mark.usefixtures("default_products")
def test_a_layer_without_a_pattern_is_timed():
    found = bench_layer(LayerKind((16, 64), None, None, torch.float32, kept=0.5), "cpu", rows=(1,), seconds=0.0)
    assert found.times[0].products.keys() == {"packed", "dense"}
    assert found.refusals == {"semi_structured": "it supports weights n:m only"}
    assert 16 * (2 * 4 + 8) < found.packed_bytes < found.dense_bytes
    assert found.to_dict()["kind"]["kept"] == 0.5


@pytest.mark.usefixtures("default_products")
def test_a_layer_is_timed_in_its_own_dtype_and_pattern():
    seen = []
    found = bench_layer(
        LayerKind((16, 64), 4, 8, torch.bfloat16), "cpu", rows=(2, 1), seconds=0.0, progress=lambda *p: seen.append(p)
    )
    assert [entry.rows for entry in found.times] == [2, 1]
    assert all(min(entry.dense, entry.products["packed"], entry.products["dense"]) > 0 for entry in found.times)
    assert found.packed_bytes == 16 * (32 * 2 + 2 * 4)
    assert found.refusals.keys() == {"semi_structured"}
    assert "no 2:4 product for cpu" in found.refusals["semi_structured"]
    assert seen == [(1, 2), (2, 2)]
    content = found.to_dict()
    assert content["kind"]["dtype"] == "bfloat16"
    assert "no 2:4 product for cpu" in content["why_no_semi_structured"]
    entry = content["times"][0]
    assert list(entry) == ["rows", "dense", "packed", "unpacked", "semi_structured", "product", "others"]
    assert (entry["unpacked"], entry["semi_structured"]) == (found.times[0].products["dense"], None)


def test_rows_must_be_some():
    for rows in ((), (0,), (4, -1)):
        with pytest.raises(ValueError, match="rows must be one or more numbers of at least 1"):
            bench_layer(LayerKind((16, 64), 2, 4, torch.float32), "cpu", rows=rows)
