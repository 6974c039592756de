"""Recipes, a run in memory to compare with, and the end of an interrupted run."""

from dataclasses import replace
from pathlib import Path

from ace_triton import Recipe, prune_model
from ace_triton.inputs import checkpoint
from ace_triton.provenance import source_facts

BALANCED = Recipe("wanda", permute=True, update="lstsq")
RECIPES = {
    "magnitude": Recipe("magnitude"),
    "ace": Recipe("ace"),
    "balanced": BALANCED,
    "layers": replace(BALANCED, sequential="layers", rotate=True),
    "dense statistics": Recipe("wanda", sequential="none"),
    "head": Recipe("wanda", sequential="none", include=("*.down_proj", "lm_head")),
    "budgets": Recipe("wanda", sparsity="4:8", budgets="outliers", update="rescale"),
    "fraction": Recipe("sparsegpt", sparsity=0.5, exclude=("*.q_proj",)),
}


def pruned_in_memory(source, out, ids, recipe, dtype="auto", batch_size=None):
    model, tokenizer = checkpoint.load(source, dtype=dtype, own_memory=True)
    report = prune_model(model, ids, recipe, batch_size=batch_size)
    checkpoint.save(model, tokenizer, out, {**report.to_dict(), **source_facts(source, out)})
    return report


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "ace_triton.json"}


class Stop(BaseException):
    """Stands for anything that ends a run."""
