"""Recipes by name, and the recipe that a call of prune_linear or prune_model asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

from .errors import RecipeError
from .methods.registry import metric, metric_names
from .recipe import Recipe
from .solvers.update import Update
from .sparsity import Sparsity

FAST = Recipe("ace")
"""The best metric alone."""

BALANCED = Recipe("wanda", permute=True, update="lstsq")
"""What gains the most for its time."""

BEST = Recipe("wanda", permute=True, update=Update("lstsq", mask_rounds=8), sequential="layers")
"""The same with more mask rounds, and with another run of the model after each group of layers."""

PRESETS = {"fast": FAST, "balanced": BALANCED, "best": BEST}

DEFAULT_PRESET = "balanced"


class NotGiven(Enum):
    """Stands for an argument that was left out."""

    NOT_GIVEN = "not given"

    def __repr__(self) -> str:
        return self.name


NOT_GIVEN = NotGiven.NOT_GIVEN


def recipe_of(method: str | Recipe, options: Mapping[str, Any], **given: Any) -> Recipe:
    """The recipe that a call asks for.

    Args:
        method: a recipe, which takes no further parts; the name of a metric; or the name of a preset.
        options: the metric's options.
        given: the recipe's other parts by name; NOT_GIVEN for those that were left out.

    Raises:
        RecipeError: if the method is unknown, a part is invalid, or something is given beside a recipe.
        PatternError: if the sparsity is invalid.
    """
    parts = {name: value for name, value in given.items() if value is not NOT_GIVEN}
    if isinstance(method, Recipe):
        if extra := [*parts, *options]:
            raise RecipeError(
                f"{', '.join(extra)}: the recipe says this already; leave it out, or change the recipe with "
                "dataclasses.replace(recipe, ...)"
            )
        return method
    if isinstance(method, str) and method in PRESETS and method not in metric_names():
        return replaced(PRESETS[method], {**parts, **({"options": options} if options else {})})
    try:
        metric(method)
    except RecipeError as error:
        raise RecipeError(f"{error}, or one of the presets {', '.join(PRESETS)}") from None
    return Recipe(method, options, **parts)


def replaced(recipe: Recipe, parts: Mapping[str, Any]) -> Recipe:
    """A recipe with some parts replaced.

    The options of a method go with the method. A permutation is dropped if the new sparsity has no groups, unless
    ``parts`` asks for it.
    """
    new = dict(parts)
    if new.get("method", recipe.method) != recipe.method:
        new.setdefault("options", {})
    if "sparsity" in new and Sparsity.of(new["sparsity"]).n is None:
        new.setdefault("permute", False)
    return replace(recipe, **new)
