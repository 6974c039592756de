"""docs/fits.md, from the content of docs/fits.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ace_triton.study.tally import shown_sparsity

from .fit_advice import published, published_beaten
from .fit_recipes import LABELS, LENGTH, RECIPES, SAMPLES, SHOWN, WINDOW_LENGTH, Result


def page(record: Mapping[str, Any]) -> str:
    """docs/fits.md."""
    lines = [
        "# Fits by model and pattern",
        "",
        "![Perplexity against the time of pruning, by model and pattern](images/fits.svg)",
        "",
        f"Measured by `make fits` on a CPU: {SAMPLES} x {LENGTH} calibration tokens of C4, windows of {WINDOW_LENGTH} "
        "tokens of WikiText-2. Each cell has the perplexity, the perplexity over the dense model's, and the CPU "
        "seconds of pruning and recovery, all threads together, without loading and evaluation. With several "
        "calibration seeds, it has their mean ± standard deviation (number of seeds). A fraction has no groups, so "
        "its channels are not permuted. Empty cells are not measured.",
    ]
    for name, model in record["models"].items():
        results = [Result(**entry) for entry in record["results"] if entry["model"] == name]
        setting = model["setting"]
        bos = "" if setting["bos"] is None else f", beginnings of sequences: {setting['bos']}"
        seeds = ", ".join(str(seed) for seed in sorted({result.seed for result in results}))
        lines += [
            "",
            f"## {name}",
            "",
            f"Dense perplexity: {model['dense']:.2f}. {setting['windows']} windows, {setting['dtype']}{bos}. "
            f"Calibration seeds: {seeds or 'none yet'}. {_machines(results)}",
            "",
            *table(results, model["dense"]),
        ]
    lines += [
        "",
        "## Published methods beside ours",
        "",
        "Wanda, RIA and SparseGPT keep their published formulas here, and run in this package's code, which takes less "
        "time than theirs ([side by side](benchmarks.md)). Beside each stands the fastest recipe that is none of these "
        "three and has a lower perplexity. The list below the table compares the three with each other.",
        "",
        *published(record),
        "",
        *published_beaten(record),
    ]
    return "\n".join(lines) + "\n"


def _machines(results: Sequence[Result]) -> str:
    counts = sorted({(result.processor, result.threads) for result in results})
    return "; ".join(f"{name}, {threads} thread{'s' if threads > 1 else ''}" for name, threads in counts)


def table(results: Sequence[Result], dense: float) -> list[str]:
    """One row per recipe, one column per pattern."""
    lines = [
        f"| recipe | {' | '.join(shown_sparsity(pattern) for pattern in SHOWN)} |",
        "|---|" + "---:|" * len(SHOWN),
    ]
    for recipe in RECIPES:
        of_recipe = [result for result in results if result.recipe == recipe]
        for steps in sorted({result.steps for result in of_recipe}):
            chosen = [result for result in of_recipe if result.steps == steps]
            label = LABELS[recipe] + (f" for {steps} steps" if steps else "")
            shown = (_cell([result for result in chosen if result.pattern == pattern], dense) for pattern in SHOWN)
            lines.append(f"| {label} | {' | '.join(shown)} |")
    return lines


def _cell(results: Sequence[Result], dense: float) -> str:
    if not results:
        return ""
    values = [result.perplexity for result in results]
    mean, seconds = statistics.fmean(values), statistics.fmean(result.seconds for result in results)
    spread = f" ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else ""
    return f"{mean:.1f}{spread}, {mean / dense:.2f}x, {seconds:,.0f} s"
