"""Perplexity of SmolLM2-135M after one-shot pruning, method by method; writes docs/quality.{json,md}.

    python -m benchmarks.quality --calibration c4.jsonl.gz --evaluation wiki.test.raw --wikitext

The protocol is that of the published code: calibration crops from C4, perplexity on WikiText-2's test rows joined
by blank lines, non-overlapping windows. A finished cell is kept in the JSON, so a killed run goes on where it was.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ace_triton.report import write_json
from ace_triton.study.cells import Cell, Variant
from ace_triton.study.recipe import Recipe
from ace_triton.study.workbench import Protocol, Workbench

METHODS: dict[str, Variant] = {
    "magnitude": Variant("magnitude"),
    "Wanda": Variant("wanda"),
    "RIA": Variant("ria"),
    "CosP, exact": Variant("cosp"),
    "CosP, exact, RIA prefactor": Variant("cosp", (("prefactor", "ria"),)),
    "CosP, published (abs)": Variant("cosp", (("reduce", "abs"),)),
    "CosP, abs, no prefactor": Variant("cosp", (("reduce", "abs"), ("prefactor", "none"))),
    "VarP on RIA": Variant("varp"),
    "VarP on Wanda": Variant("varp", (("base", "wanda"),)),
    "ACE (default)": Variant("ace"),
    "ACE over the root of VarP": Variant("ace", (("power", 0.5),)),
    "ACE over the square of VarP": Variant("ace", (("power", 2.0),)),
    "ACE times VarP": Variant("ace", (("sign", 1),)),
    "ACE on RIA": Variant("ace", (("base", "ria"),)),
    "ACE without a base": Variant("ace", (("base", "none"),)),
    "ACE times VarP by the largest, on RIA": Variant("ace", (("base", "ria"), ("norm", "max_layer"), ("sign", 1))),
    "ACE times VarP by the largest, without a base": Variant(
        "ace", (("base", "none"), ("norm", "max_layer"), ("sign", 1))
    ),
    "ACE times VarP by the largest, on Wanda": Variant("ace", (("base", "wanda"), ("norm", "max_layer"), ("sign", 1))),
    "ACE, published form (Wanda, abs)": Variant("ace-paper"),
    "SAAP's fusion": Variant("saap"),
    "SparseGPT": Variant("sparsegpt"),
}

PERMUTED = ", permuted"
"""Marks a method that ran with ``permute=True``."""

console = Console()


def main(
    calibration: Annotated[str, typer.Option()] = "allenai/c4:en",
    evaluation: Annotated[str, typer.Option()] = "Salesforce/wikitext:wikitext-2-raw-v1:test",
    wikitext: Annotated[bool, typer.Option("--wikitext")] = False,
    methods: Annotated[list[str] | None, typer.Option("--method")] = None,
    sparsities: Annotated[list[str] | None, typer.Option("--sparsity")] = None,
    lengths: Annotated[list[int] | None, typer.Option("--length")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed")] = None,
    permute: Annotated[bool, typer.Option("--permute", help="Reorder channels first; n:m only.")] = False,
    samples: Annotated[int, typer.Option()] = 32,
    windows: Annotated[int, typer.Option()] = 20,
    window_length: Annotated[int, typer.Option()] = 512,
    out: Annotated[Path, typer.Option()] = Path("docs/quality.json"),
) -> None:
    """Measure every combination that is not in OUT yet, then write OUT and the table beside it."""
    content = json.loads(out.read_text()) if out.is_file() else {}
    cells: dict[str, float] = content.get("cells", {})
    seconds: dict[str, float] = content.get("cpu_seconds", {})
    recipe = Recipe(permute)
    marks = PERMUTED * permute
    protocol = Protocol("smollm2", calibration, evaluation, wikitext, samples, windows, window_length)
    bench = Workbench(protocol)
    setting = {
        "model": "SmolLM2-135M-Instruct (dequantised from 4 bits, bfloat16)",
        "evaluation_sha256": bench.setting.evaluation_sha256,
        "windows": windows,
        "window_length": window_length,
        "samples": samples,
    }

    def measure(key: str) -> None:
        cells[key] = bench.perplexity()
        console.print(f"{key}: {cells[key]:.2f} after {seconds.get(key, 0):.0f} s of CPU time", highlight=False)
        write_json(out, {"setting": setting, "cells": cells, "cpu_seconds": seconds})

    if "dense" not in cells:
        measure("dense")
    for seed in seeds or [0]:
        for length in lengths or [16, 128]:
            for sparsity in sparsities or (["2:4"] if permute else ["2:4", "0.5"]):
                for label in methods or METHODS:
                    key = f"{label}{marks} | {sparsity} | L={length} | seed {seed}"
                    if key not in cells:
                        variant = METHODS[label].with_recipe(recipe)
                        with bench.pruned(Cell(variant, sparsity, length, seed)) as pruning:
                            seconds[key] = round(pruning.cpu_seconds, 1)
                            measure(key)
    out.with_suffix(".md").write_text(_page(out.stem, setting, cells, seconds))


def cells_by_column(cells: dict[str, float]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Perplexities over seeds: (sparsity, "L=length") -> method -> values."""
    table: dict[tuple[str, str], dict[str, list[float]]] = {}
    for key, value in cells.items():
        if key != "dense":
            label, sparsity, length, _ = key.split(" | ")
            table.setdefault((sparsity, length), {}).setdefault(label, []).append(value)
    return table


def _page(name: str, setting: dict[str, Any], cells: dict[str, float], seconds: dict[str, float]) -> str:
    table = cells_by_column(cells)
    columns = sorted(table, key=lambda column: (column[0], int(column[1][2:])))
    labels = sorted({label for column in columns for label in table[column]}, key=_place)
    lines = [
        "# Perplexity after one-shot pruning",
        "",
        f"Measured on a CPU by `make {name}`; nothing here is quoted from a paper.",
        "",
        f"{setting['model']}, {setting['samples']} calibration sequences of L tokens of C4, WikiText-2 test, "
        f"{setting['windows']} windows of {setting['window_length']} tokens. Dense: {cells['dense']:.2f}. "
        "Mean over calibration seeds, their standard deviation, and in brackets their number.",
        "",
        *_table(table, labels, columns),
    ]
    if seconds:
        lines += ["", "CPU seconds that pruning took, calibration forwards included:", ""]
        lines += _table(cells_by_column(seconds), labels, columns)
    return "\n".join(lines) + "\n"


def _table(
    table: dict[tuple[str, str], dict[str, list[float]]], labels: list[str], columns: list[tuple[str, str]]
) -> list[str]:
    lines = ["| method | " + " | ".join(f"{sparsity}, {length}" for sparsity, length in columns) + " |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    for label in labels:
        values = [table.get(column, {}).get(label) for column in columns]
        if any(values):
            lines.append(f"| {label} | " + " | ".join(shown(value) for value in values) + " |")
    return lines


def _place(label: str) -> tuple[int, str]:
    """Where a method stands in a table: in the order of METHODS, its marked forms after it."""
    method = max((name for name in METHODS if label == name or label.startswith(f"{name}, ")), key=len)
    return list(METHODS).index(method), label


def shown(values: list[float] | None) -> str:
    """Mean, spread and number of a cell's values."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f} (1)"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)})"


if __name__ == "__main__":
    typer.run(main)
