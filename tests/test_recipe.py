"""A recipe: checked once, the same as JSON, and the same in every call that takes it."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch

from ace_triton import (
    AceError,
    PatternError,
    Recipe,
    RecipeError,
    ScoreTerms,
    Sparsity,
    Update,
    prune_linear,
    prune_model,
    register_metric,
)
from ace_triton.methods.registry import _REGISTRY
from ace_triton.presets import BALANCED, PRESETS

FULL = Recipe(
    "ria",
    {"a": 0.25},
    Sparsity(0.123456789, scope="layer"),
    update=Update("lstsq", mask_rounds=2),
    sequential="layers",
    budgets="outliers",
    include=["*.mlp.*"],
    exclude="*.up_proj",
)


@pytest.mark.parametrize(
    "recipe", [Recipe(), FULL, Recipe("dass", sparsity=Sparsity("2:4", axis="out")), *PRESETS.values()]
)
def test_a_recipe_is_the_same_after_json(recipe):
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert again.needs == recipe.needs
    assert pickle.loads(pickle.dumps(again)) == copy.deepcopy(again) == recipe


def test_defaults_are_written_out_and_do_not_count():
    assert Recipe("ria", {"a": 0.5}) == Recipe("ria")
    assert Recipe("ria").to_dict() == {
        "method": "ria",
        "options": {"a": 0.5},
        "sparsity": {"pattern": "2:4", "axis": None, "scope": "row"},
        "update": None,
        "permute": False,
        "sequential": "blocks",
        "budgets": None,
        "include": None,
        "exclude": [],
    }
    assert Recipe.from_dict({"method": "ria", "sparsity": "2:4", "exclude": None}) == Recipe("ria")
    assert (FULL.include, FULL.exclude) == (("*.mlp.*",), ("*.up_proj",))


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ([], RecipeError, "a recipe is a mapping with the entries method, options"),
        ({}, RecipeError, "a recipe needs the entry 'method'"),
        ({"method": "ria", "sparsty": 0.5}, RecipeError, "a recipe has no entry 'sparsty'; its entries: method, "),
        ({"method": "rai"}, RecipeError, "unknown method 'rai': use one of magnitude, "),
        ({"method": "ria", "options": {"b": 1}}, RecipeError, "method 'ria' has no option 'b'; its options: a=0.5"),
        ({"method": "ria", "options": {"a": "x"}}, RecipeError, "method 'ria': a must be a number; got 'x'"),
        ({"method": "ria", "options": [1]}, RecipeError, "options must be a mapping"),
        ({"method": "ria", "sparsity": "5:4"}, PatternError, "'5:4': n:m needs m in"),
        ({"method": "ria", "sparsity": {"axis": "in"}}, PatternError, "a sparsity needs the entry 'pattern'"),
        ({"method": "ria", "sparsity": {"patern": 1}}, PatternError, "no entry 'patern'; its entries: pattern, axis, "),
        ({"method": "ria", "update": "move"}, RecipeError, "update must be one of rescale, lstsq"),
        ({"method": "ria", "update": {"kind": "lstsq", "x": 1}}, RecipeError, "the update 'lstsq' has no option 'x'"),
        ({"method": "ria", "permute": 1}, RecipeError, "permute must be True or False; got 1"),
        ({"method": "ria", "permute": True, "sparsity": 0.5}, RecipeError, "permute orders channels into the groups"),
        ({"method": "ria", "sequential": "block"}, RecipeError, "sequential must be one of none, blocks, layers"),
        ({"method": "ria", "budgets": "owl"}, RecipeError, "budgets must be one of outliers, or None; got 'owl'"),
        ({"method": "ria", "budgets": "outliers", "sparsity": "1:4"}, RecipeError, "budgets let some blocks keep one"),
        ({"method": "ria", "include": [3]}, RecipeError, "include must be a shell pattern such as"),
    ],
)
def test_an_invalid_recipe_gives_one_line(record, error, message):
    with pytest.raises(error, match=r"^[^\n]*$") as raised:
        Recipe.from_dict(record)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"recipe.json: the recipe cannot be read \(No such file"),
        ("{", "recipe.json: the recipe is not JSON"),
        ("[]", "recipe.json: a recipe is a JSON object; this file holds a list"),
        ('{"recipe": 3}', "recipe.json: a recipe is a mapping with the entries .*; got 3"),
        ('{"method": "rai"}', "recipe.json: unknown method 'rai'"),
    ],
)
def test_an_invalid_file_is_named(tmp_path, content, message):
    path = tmp_path / "recipe.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="is a folder: name the recipe's JSON file"):
        Recipe.load(tmp_path)


def test_a_file_may_hold_the_recipe_or_have_it_as_an_entry(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(FULL.to_json())
    assert Recipe.load(path) == FULL
    path.write_text(json.dumps({"recipe": FULL.to_dict(), "layers": []}))
    assert Recipe.load(str(path)) == FULL


def test_an_option_that_json_cannot_hold(monkeypatch):
    monkeypatch.setattr("ace_triton.methods.registry._REGISTRY", dict(_REGISTRY))

    @register_metric("typed")
    def typed(weight, stats, kind=float, pair=(1, 2)):
        return ScoreTerms(scale=stats.norm)

    assert Recipe.from_json(Recipe("typed").to_json()) == Recipe("typed")
    assert Recipe("typed", {"kind": int}).to_dict()["options"] == {"kind": int}
    with pytest.raises(RecipeError, match=r"option pair=\(1, 3\) of method 'typed' cannot be saved as JSON"):
        Recipe("typed", {"pair": (1, 3)}).to_json()


def test_a_model_is_pruned_the_same_by_a_recipe_and_by_its_parts(make_decoder, ids):
    recipe = Recipe("ria", {"a": 0.3}, "4:8", update="rescale", permute=True, exclude="*.q_proj")
    one, other = make_decoder("llama"), make_decoder("llama")
    report = prune_model(one, ids, recipe, batch_size=2)
    parts = {"update": "rescale", "permute": True, "exclude": "*.q_proj", "a": 0.3}
    assert prune_model(other, ids, "ria", "4:8", batch_size=2, **parts).recipe == report.recipe == recipe
    assert report.to_dict()["recipe"] == recipe.to_dict()
    states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_a_layer_is_pruned_the_same_by_a_recipe_and_by_its_parts():
    torch.manual_seed(0)
    tokens = torch.randn(40, 32)
    one = torch.nn.Linear(32, 16)
    other = copy.deepcopy(one)
    prune_linear(one, tokens, Recipe("ria", {"a": 0.3}, "4:8", update="lstsq"))
    prune_linear(other, tokens, "ria", "4:8", update="lstsq", a=0.3)
    assert torch.equal(one.weight, other.weight)


def test_the_parts_of_a_preset_can_be_replaced(make_decoder, ids):
    assert prune_model(make_decoder("llama"), ids, "balanced").recipe == BALANCED
    report = prune_model(make_decoder("llama"), ids, "balanced", 0.5, update=None)
    assert report.recipe == Recipe("wanda", sparsity=0.5)


def test_nothing_is_given_beside_a_recipe(make_decoder, ids):
    model = make_decoder("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match=r"^sparsity, update, a: the recipe says this already; leave it out"):
        prune_model(model, ids, Recipe("ria"), "2:4", update=None, a=0.5)
    with pytest.raises(RecipeError, match=r"^sparsity: the recipe says this already"):
        prune_linear(torch.nn.Linear(8, 8), torch.ones(2, 8), Recipe("ria"), "2:4")
    with pytest.raises(RecipeError, match=r"unknown method 'rai'.*, or one of the presets fast, balanced, best"):
        prune_model(model, ids, "rai")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_single_layer_refuses_what_needs_a_model():
    layer = torch.nn.Linear(8, 8)
    with pytest.raises(RecipeError, match=r"^the recipe's permute and exclude need a whole model: use prune_model, or"):
        prune_linear(layer, torch.ones(2, 8), dataclasses.replace(BALANCED, exclude="*.q_proj"))
    assert bool((layer.weight != 0).all())


def test_every_error_of_a_recipe_is_an_ace_error():
    with pytest.raises(AceError, match="the recipe is not JSON"):
        Recipe.from_json("{")
