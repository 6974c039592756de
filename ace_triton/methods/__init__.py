"""Pruning methods: a metric turns a weight and its statistics into scores; a method with a solver prunes by itself."""

# Importing a module registers its methods, so this order is the order in which users see them.
from . import wanda_ria, dass, ace, saap, sparsegpt  # noqa: F401, I001
