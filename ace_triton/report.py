"""Tables and JSON for what the commands found."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .evaluate import Perplexity
from .inspect_checkpoint import TensorSparsity
from .prune_model import ModelReport
from .sparsify import SparsifyReport


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, target)


def prune_table(report: ModelReport) -> Table:
    """What a pruning run did and how long it took."""
    table = Table(title=f"{report.method}, {report.sparsity}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    kept = sum(layer.kept for layer in report.layers) / max(len(report.layers), 1)
    table.add_row("layers pruned", str(len(report.layers)))
    table.add_row("weights kept in them", f"{kept:.1%}")
    for stage in ("load", "calibration", "statistics", "select", "total"):
        label = {"select": "score and mask", "calibration": "calibration forwards"}.get(stage, stage)
        table.add_row(label, f"{getattr(report.seconds, stage):.2f} s")
    table.add_row("peak memory", f"{report.peak_bytes / 2**30:.2f} GiB")
    return table


def packing_table(report: SparsifyReport) -> Table:
    """How much smaller the packed layers are."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    patterns = Counter(layer.pattern for layer in report.layers)
    for pattern, count in patterns.most_common():
        table.add_row(f"layers packed {pattern}", str(count))
    table.add_row("their weights, dense", f"{report.dense_bytes / 2**20:.1f} MiB")
    table.add_row("packed", f"{report.packed_bytes / 2**20:.1f} MiB ({report.packed_bytes / report.dense_bytes:.1%})")
    return table


def skipped_lines(report: ModelReport | SparsifyReport, most: int = 12) -> list[str]:
    """One line for each parameter left dense, with its share of the model."""
    lines = [f"{s.name}: {s.reason} ({s.share:.1%} of the model's parameters)" for s in report.skipped]
    if len(lines) > most:
        rest = sum(s.share for s in report.skipped[most:])
        lines = [*lines[:most], f"and {len(lines) - most} more ({rest:.1%})"]
    return lines


def perplexity_table(result: Perplexity) -> Table:
    """One perplexity."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("perplexity", f"{result.perplexity:.3f}")
    table.add_row("windows", f"{result.windows} of {result.length} tokens")
    table.add_row("tokens predicted", f"{result.tokens:,}")
    return table


def info_table(tensors: Sequence[TensorSparsity]) -> Table:
    """Sparsity and pattern of every matrix."""
    table = Table("layer", "shape")
    table.add_column("zeros", justify="right")
    table.add_column("pattern")
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape))
        pattern = f"{tensor.pattern}, packed" if tensor.packed else tensor.pattern
        table.add_row(tensor.name.removesuffix(".weight"), shape, f"{tensor.zeros:.2%}", pattern)
    return table


def info_summary(tensors: Sequence[TensorSparsity]) -> str:
    """One line: share of zeros over all matrices, and how many have which pattern."""
    sizes = [tensor.shape[0] * tensor.shape[1] for tensor in tensors]
    zeros = sum(size * tensor.zeros for size, tensor in zip(sizes, tensors, strict=True)) / max(sum(sizes), 1)
    patterns: dict[str, int] = {}
    for tensor in tensors:
        patterns[tensor.pattern] = patterns.get(tensor.pattern, 0) + 1
    counted = ", ".join(f"{count} {pattern}" for pattern, count in sorted(patterns.items(), key=lambda p: -p[1]))
    return f"{len(tensors)} matrices, {zeros:.1%} zeros: {counted}"
