"""A recipe says everything that pruning does to a model. It is checked once, and it can be written as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import RecipeError
from .methods.registry import Metric, Needs, metric
from .solvers.quantize import Quantization
from .solvers.update import Update
from .sparsity import Sparsity

Sequential = Literal["none", "blocks", "layers"]
"""What is pruned before the model runs again on its pruned weights: the whole model, a block, or the layers of a block
that share an input."""

BUDGETS = ("outliers",)

_SEQUENTIAL_WORDS = {"none": "at once", "layers": "layer by layer"}


@dataclass(frozen=True, init=False)
class Recipe:
    """What pruning does to a model.

    ``dataclasses.replace(recipe, sparsity="4:8")`` gives a recipe with one part changed. Recipes compare equal if they
    do the same.

    Attributes:
        method: name of the metric that scores the weights (:func:`~ace_triton.methods.registry.metric_names`).
        options: the metric's options that differ from its defaults.
        sparsity: the pattern, with its axis and scope.
        update: how the kept weights are changed; None leaves them as they are.
        permute: if True, input channels are reordered first, so that n:m keeps more of the score.
        rotate: if True, the values of attention heads are rotated first, so that less of the importance is pruned.
        sequential: what is pruned before the model runs again: "none" for the whole model, "blocks" for a block,
            "layers" for the layers of a block that share an input.
        budgets: "outliers" lets blocks keep different shares of their weights; None gives every block the same share.
        include: shell patterns of the layers to prune; None for all layers of the blocks.
        exclude: shell patterns of the layers to leave dense.
        quantize: how the kept weights are quantized at the end; None leaves them as they are.

    Raises:
        RecipeError: if a part is invalid, or two parts do not go together.
        PatternError: if the sparsity is invalid.
    """

    method: str
    options: Mapping[str, Any] = field(hash=False)
    sparsity: Sparsity
    update: Update | None
    permute: bool
    sequential: Sequential
    budgets: str | None
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    quantize: Quantization | None
    rotate: bool

    def __init__(
        self,
        method: str = "ace",
        options: Mapping[str, Any] | None = None,
        sparsity: str | float | Mapping[str, Any] | Sparsity = "2:4",
        *,
        update: str | Mapping[str, Any] | Update | None = None,
        permute: bool = False,
        sequential: Sequential = "blocks",
        budgets: str | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        quantize: int | Mapping[str, Any] | Quantization | None = None,
        rotate: bool = False,
    ) -> None:
        parts = {
            "method": method,
            "options": _changed_options(metric(method), {} if options is None else options),
            "sparsity": Sparsity.of(sparsity),
            "update": _update(update),
            "permute": permute,
            "sequential": sequential,
            "budgets": budgets,
            "include": None if include is None else _name_patterns("include", include),
            "exclude": () if exclude is None else _name_patterns("exclude", exclude),
            "quantize": Quantization.of(quantize),
            "rotate": rotate,
        }
        for name, value in parts.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        for name in ("permute", "rotate"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if self.sequential not in get_args(Sequential):
            raise RecipeError(f"sequential must be one of {', '.join(get_args(Sequential))}; got {self.sequential!r}")
        _check_budgets(self.budgets, self.sparsity)
        if self.update is not None and self.update.block_epochs and self.sequential == "none":
            raise RecipeError(
                "block_epochs trains each block on the outputs of the pruned blocks before it, which "
                'sequential="none" never computes: leave one of them out'
            )
        if self.update is not None and self.update.block_epochs and self.quantize is not None:
            bits = self.quantize.bits
            raise RecipeError(
                f"block_epochs trains the weights after their layers are quantized, so they do not stay at {bits} "
                f"bits: leave quantize (--bits) out and pack the result with ace-triton pack --bits {bits} or "
                f"pack_model(model, bits={bits}), or leave block_epochs out"
            )
        if self.permute and self.sparsity.n is None:
            raise RecipeError(
                f"permute orders channels into the groups of n:m; a sparsity of {self.sparsity} has none: leave "
                "permute out, or give a pattern such as 2:4"
            )
        if self.permute and self.sequential == "layers" and self.needs.consumer:
            raise RecipeError(
                f'permute reorders the rows of gate and up, which {self.method} with sequential="layers" has '
                "pruned in groups by then: leave one of them out"
            )
        self._check_rotate()

    def _check_rotate(self) -> None:
        if self.rotate and self.sequential == "none":
            raise RecipeError(
                'rotate runs each block once more before it is pruned, and sequential="none" runs each block only '
                "once: leave one of them out"
            )
        if self.rotate and not self.needs.tokens:
            raise RecipeError(
                f"rotate learns from calibration tokens, and {self.method} alone reads none: leave rotate out, take "
                'another method, or add update="lstsq"'
            )

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: cached properties hold functions, which cannot be pickled."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @cached_property
    def metric(self) -> Metric:
        """The metric that scores the weights."""
        return metric(self.method)

    @cached_property
    def complete_options(self) -> dict[str, Any]:
        """All options of the metric, with its defaults."""
        return self.metric.complete(self.options)

    @cached_property
    def needs(self) -> Needs:
        """What the metric, the update and the quantization need beside the weight."""
        return needs_with(self.metric.needs(self.complete_options), self.update, self.quantize)

    def for_layers(self, sparsity: Sparsity) -> Recipe:
        """What is done to each layer alone, with the sparsity of its block."""
        update = None if self.update is None else self.update.of_layers
        return replace(self, sparsity=sparsity, update=update, permute=False, rotate=False, budgets=None)

    @property
    def calibrated(self) -> bool:
        """True if the result depends on calibration tokens."""
        return self.needs.tokens or self.budgets is not None

    @property
    def words(self) -> str:
        """Everything but the sparsity and the layer names, as in "wanda, permuted, lstsq, 8 mask rounds"."""
        pairs = "+".join(f"{name}={value}" for name, value in self.options.items())
        return ", ".join([f"{self.method}:{pairs}" if pairs else self.method, *self.additions])

    @property
    def additions(self) -> tuple[str, ...]:
        """What is added to the metric, as in ("permuted", "lstsq", "8 mask rounds"); empty for a metric alone."""
        words = [word for word, part in (("rotated", self.rotate), ("permuted", self.permute)) if part]
        words += [] if self.update is None else _update_words(self.update)
        words += [] if self.sequential == "blocks" else [_SEQUENTIAL_WORDS[self.sequential]]
        words += [] if self.budgets is None else [f"shares by {self.budgets}"]
        words += [] if self.quantize is None else [str(self.quantize)]
        return tuple(words)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with all options, so that a saved recipe keeps its meaning if a default changes.

        A default that JSON cannot hold is left out. An option that was given keeps its value, whatever it is. Without
        quantization or rotation there is no entry for it.
        """
        options = self.complete_options.items()
        return {
            "method": self.method,
            "options": {name: value for name, value in options if name in self.options or is_json(value)},
            "sparsity": self.sparsity.to_dict(),
            "update": None if self.update is None else self.update.to_dict(),
            "permute": self.permute,
            "sequential": self.sequential,
            "budgets": self.budgets,
            "include": None if self.include is None else list(self.include),
            "exclude": list(self.exclude),
            **({} if self.quantize is None else {"quantize": self.quantize.to_dict()}),
            **({"rotate": True} if self.rotate else {}),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`; entries that are missing have their defaults, but "method" is required.

        Raises:
            RecipeError: if the record is no mapping, has an unknown entry or no method, or the recipe is invalid.
            PatternError: if the sparsity is invalid.
        """
        known = [entry.name for entry in fields(cls)]
        if not isinstance(record, Mapping):
            raise RecipeError(f"a recipe is a mapping with the entries {', '.join(known)}; got {record!r}")
        if unknown := [name for name in record if name not in known]:
            raise RecipeError(f"a recipe has no entry {unknown[0]!r}; its entries: {', '.join(known)}")
        if "method" not in record:
            raise RecipeError("a recipe needs the entry 'method', such as \"wanda\"")
        return cls(**record)

    def to_json(self) -> str:
        """As JSON text; RecipeError if an option has a value that JSON cannot hold."""
        for name, value in self.options.items():
            if not is_json(value):
                raise RecipeError(
                    f"option {name}={value!r} of method {self.method!r} cannot be saved as JSON: give a number, text, "
                    "True, False, None, or a list of such values"
                )
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The inverse of :meth:`to_json`; errors as in :meth:`from_dict`, or RecipeError if the text is not JSON."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"the recipe is not JSON ({error})") from error
        return cls.from_dict(record)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """A recipe from a JSON file: one that holds :meth:`to_json`, or the ``ace_triton.json`` beside a pruned model.

        Raises:
            RecipeError: if the file cannot be read or holds no valid recipe.
        """
        return recipe_in(read_recipe_file(path), path)


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; RecipeError if there is none."""
    if Path(path).is_dir():
        raise RecipeError(f"{path} is a folder: name the recipe's JSON file, such as the ace_triton.json in it")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: the recipe is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a JSON object; this file holds a {type(content).__name__}")
    return content


def recipe_in(content: Mapping[str, Any], path: str | Path) -> Recipe:
    """The recipe in the content of a file: its entry "recipe", or all of it if there is no such entry."""
    try:
        return Recipe.from_dict(content.get("recipe", content))
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error


def needs_with(needs: Needs, update: Update | None, quantize: Quantization | None = None) -> Needs:
    """What a metric, an update and a quantization need together."""
    if quantize is not None and quantize.rule == "gptq":
        needs = replace(needs, tokens=True, gram=True)
    if update is None:
        return needs
    exact = needs.gram or update.kind == "lstsq"
    return replace(needs, tokens=True, gram=exact, sample=not exact)


def is_json(value: Any) -> bool:
    """True if a value is the same after it was written as JSON and read again."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _changed_options(chosen: Metric, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from the metric's defaults."""
    if not isinstance(options, Mapping):
        raise RecipeError(f"options must be a mapping from names to values; got {options!r}")
    try:
        complete = chosen.complete(options)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    defaults = chosen.options
    return {name: value for name, value in complete.items() if name in options and not _same(value, defaults[name])}


def _same(value: Any, default: Any) -> bool:
    plain = (int, float, str, list, tuple, dict)
    if value is default or not isinstance(value, plain) or not isinstance(default, plain):
        return value is default
    return isinstance(value, bool) == isinstance(default, bool) and bool(value == default)


def _update(update: str | Mapping[str, Any] | Update | None) -> Update | None:
    try:
        return Update.of(update)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _name_patterns(part: str, given: str | Sequence[str]) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else (given,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise RecipeError(f"{part} must be a shell pattern such as '*.q_proj', or a list of patterns; got {given!r}")
    return patterns


def _check_budgets(budgets: str | None, pattern: Sparsity) -> None:
    if budgets is None:
        return
    if budgets not in BUDGETS:
        raise RecipeError(f"budgets must be one of {', '.join(BUDGETS)}, or None; got {budgets!r}")
    if pattern.n is not None and pattern.m is not None and not 1 < pattern.n < pattern.m - 1:
        raise RecipeError(
            f"budgets let some blocks keep one more and some one less of every {pattern.m}, which {pattern} has no "
            "room for: give a pattern as 2:4 or 4:8, or a fraction"
        )


def _update_words(update: Update) -> list[str]:
    changed = update.changed
    rounds = changed.pop("mask_rounds", None)
    words = [update.kind] if rounds is None else [update.kind, f"{rounds} mask rounds"]
    return words + [f"{name}={value}" for name, value in changed.items()]
