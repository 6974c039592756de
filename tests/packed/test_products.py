"""A product that is registered here is chosen, timed by bench and named in errors, without a change elsewhere."""

import copy
import json

import pytest
import torch
from torch import nn

from ace_triton import NMLinear, RowLimits, prune_linear, set_row_limits
from ace_triton.errors import ArgumentError
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.packed.bench import LayerKind, RowTimes, bench_layer, best_limits
from ace_triton.packed.dispatch import choose_product, default_limits
from ace_triton.packed.products import Product, register_product, registry


class Doubling(Product):
    """Computes 4 to 40 rows of fp32, in fp64, and counts its calls."""

    name, label, converts = "doubling", "in fp64", True

    def __init__(self):
        self.calls = 0

    def refusal(self, packed, rows):
        if packed.values.dtype != torch.float32:
            return f"doubling multiplies float32, the weight is {packed.values.dtype}"
        return None if 4 <= rows <= 40 else "doubling takes 4 to 40 rows"

    def multiply(self, tokens, packed, bias, limits):
        assert 4 <= len(tokens) <= 40
        self.calls += 1
        bias = None if bias is None else bias.double()
        return nn.functional.linear(tokens.double(), unpack_nm(packed).double(), bias).float()


@pytest.fixture
def doubling(monkeypatch) -> Doubling:
    monkeypatch.setattr(registry, "products", registry.products)
    monkeypatch.setattr(registry, "others", registry.others)
    product = Doubling()
    register_product(product)
    return product


@pytest.fixture
def pair() -> tuple[nn.Linear, NMLinear]:
    """A pruned layer, dense and packed."""
    torch.manual_seed(0)
    dense = nn.Linear(32, 24)
    prune_linear(dense, method="magnitude")
    return dense, NMLinear.from_linear(dense, 2, 4)


@pytest.mark.usefixtures("default_products")
def test_without_it_nothing_changes(pair):
    assert [product.name for product in registry.products] == ["packed", "semi_structured", "dense"]
    assert registry.others == ()
    assert default_limits(torch.device("cpu"), torch.float32).others == ()
    assert choose_product(8, pair[1].packed, RowLimits(8)) == "packed"
    assert choose_product(9, pair[1].packed, RowLimits(8)) == "dense"


def test_a_registered_product_is_used_for_the_calls_it_does_not_refuse(doubling, pair):
    dense, packed = pair
    assert [rows for rows in range(60) if choose_product(rows, packed.packed) == "doubling"] == list(range(4, 41))
    assert choose_product(8, NMLinear.from_linear(copy.deepcopy(dense).half(), 2, 4).packed) != "doubling"
    for rows in (1, 4, 40, 41):
        tokens = torch.randn(rows, 32, requires_grad=True)
        outputs = packed(tokens)
        torch.testing.assert_close(outputs, dense(tokens))
        outputs.sum().backward()
    assert doubling.calls == 2


def test_limits_name_the_rows_it_is_used_for(doubling, pair):
    packed = pair[1]
    set_row_limits(packed, RowLimits(8))
    packed(torch.randn(4, 32))
    assert doubling.calls == 0
    set_row_limits(packed, RowLimits(8, others=(("doubling", 2, 6), ("doubling", 12, None))))
    chosen = [rows for rows in range(60) if choose_product(rows, packed.packed, packed.limits) == "doubling"]
    assert chosen == [4, 5, 6, *range(12, 41)]
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True, dynamic=True)
    tokens = torch.randn(12, 32)
    torch.testing.assert_close(compiled(tokens), pair[0](tokens))
    assert doubling.calls == 1


def test_bench_times_it_and_finds_its_limits(doubling, command, tmp_path):
    found = bench_layer(LayerKind((16, 64), 2, 4, torch.float32), "cpu", rows=(1, 4, 99), seconds=0.0)
    assert ["doubling" in entry.products for entry in found.times] == [False, True, False]
    assert found.times[1].product == "doubling"
    assert found.times[1].taken == found.times[1].products["doubling"]
    assert found.to_dict()["times"][1]["others"] == {"doubling": found.times[1].taken}
    assert found.to_dict()["times"][0]["others"] == {}
    words = ("bench", "--shape", "16x64", "--rows", "8", "--json", tmp_path / "b.json", "--dtype")
    code, out, errors = command(*words, "float32")
    assert code == 0, errors
    assert "in fp64" in out
    assert json.loads((tmp_path / "b.json").read_text())["layers"][0]["times"][0]["product"] == "doubling"
    code, out, errors = command(*words, "bfloat16")
    assert code == 0, errors
    assert "in fp64 was not timed: doubling multiplies float32, the weight is torch.bfloat16" in " ".join(out.split())


def test_limits_that_bench_prints_make_the_fastest_choice(doubling):
    def times(rows, packed, dense, own):
        return RowTimes(rows, 1.0, {"packed": packed, "dense": dense, "doubling": own}, "packed")

    few = [times(1, 1, 2, 3), times(4, 2, 3, 1)]
    fits = best_limits([*few, times(8, 1, 3, 2), times(16, 3, 2, 1), times(32, 3, 1, 2)])
    assert fits == RowLimits(8, others=(("doubling", 4, 4), ("doubling", 16, 16)))
    assert eval(repr(fits)) == fits
    assert best_limits(few).others == (("doubling", 4, None),)
    assert repr(RowLimits(8, 9)) == "RowLimits(packed=8, semi_structured=9)"


@pytest.mark.usefixtures("default_products")
def test_errors_name_it(doubling):
    with pytest.raises(ArgumentError, match=r"others names 'nosuch', which is not .*\(registered: doubling\)"):
        RowLimits(8, others=(("nosuch", 1, 2),))
    with pytest.raises(ArgumentError, match="others names 'packed'"):
        RowLimits(8, others=(("packed", 1, 2),))
    with pytest.raises(ArgumentError, match=r"there is a product 'doubling' already.*other than doubling, packed"):
        register_product(Doubling())
    for wrong in (("doubling", -1, 2), ("doubling", 1, 2.5)):
        with pytest.raises(ArgumentError, match="the rows of 'doubling' must be numbers"):
            RowLimits(8, others=(wrong,))
    with pytest.raises(ArgumentError, match=r"must hold \(name, first, last\)"):
        RowLimits(8, others=("doubling",))
    doubling.name = "two words"
    with pytest.raises(ArgumentError, match="'two words'"):
        register_product(doubling)
