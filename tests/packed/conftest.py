"""The products of packed layers that are there by default."""

from __future__ import annotations

import pytest

import ace_triton.packed.dispatch  # noqa: F401  registers them
from ace_triton.packed.products import registry
from ace_triton.packed.sparse_units import SparseUnits


@pytest.fixture
def default_products(monkeypatch) -> None:
    """Leaves out the product that ACE_TRITON_MMA_SP=1 adds."""
    name = SparseUnits.name
    monkeypatch.setattr(registry, "products", tuple(product for product in registry.products if product.name != name))
    monkeypatch.setattr(registry, "others", tuple(other for other in registry.others if other != name))
