"""Tables and JSON files for the commands' results."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table

from ..byte_sizes import shown_bytes
from ..decoders.plan import Skipped
from ..errors import ArgumentError
from ..evaluate import Perplexity
from ..model_report import ModelReport
from ..packed.inspect import TensorSparsity
from ..packed.manifest import DENSE
from ..packed.pack_model import SparsifyReport
from ..reordering.fold import Unfolded
from ..reordering.reorder import Reordered
from ..reordering.rotate import Rotated
from ..task_evaluation import TaskScore

CHECKPOINT_JSON = re.compile(
    r"(.*config|tokenizer.*|special_tokens_map|added_tokens|vocab|chat_template|modules|.*\.index|ace_triton.*)\.json"
)
"""Names of JSON files that belong to checkpoints."""


MOST_SHAPES = 4
"""Largest number of shapes of one kind of layer that have rows of their own."""


def check_json_target(path: str | Path) -> None:
    """Raise ArgumentError if :func:`write_json` would destroy something at ``path``, or could not write there.

    An existing file is replaced only if it is empty or holds JSON, and its name is not that of a checkpoint's file.
    """
    target = Path(path)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise ArgumentError(f"{target}: name a file in a folder that exists")
    if not target.is_file():
        return
    with target.open("rb") as file:
        start = file.read(1024).lstrip()
    if start and start[:1] not in b"{[":
        raise ArgumentError(f"{target}: exists and holds no JSON: name another file")
    if CHECKPOINT_JSON.fullmatch(target.resolve().name):
        raise ArgumentError(f"{target}: exists and has the name of a checkpoint's file: name another one")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON so that the file is either the old one or the complete new one.

    A link, a device or a pipe is written to; it is not replaced by a file.

    Raises:
        ArgumentError: as :func:`check_json_target`.
    """
    target = Path(path)
    check_json_target(target)
    text = json.dumps(content, indent=2) + "\n"
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        mode = 0
    if mode and not stat.S_ISREG(mode):
        target.write_text(text)
        return
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(text)
        if mode:
            partial.chmod(stat.S_IMODE(mode))
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


_STAGE_LABELS = {
    "select": "score and mask",
    "calibration": "calibration forwards",
    "rotate": "rotation of values",
    "permute": "channel order",
    "update": "weight update",
    "quantize": "rounding",
    "block_fit": "block fit",
    "other": "everything else",
    "total": "total, without reading text and saving",
}


def facts_table(title: str | None = None) -> Table:
    """An empty table of names and values; long cells wrap."""
    table = Table(title=title, show_header=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column(justify="right", overflow="fold")
    return table


def headed_table(*headings: str, title: str | None = None, left: Sequence[str] = ()) -> Table:
    """An empty table with headings; columns are aligned right, except those in ``left``; long cells wrap."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    return table


def prune_table(report: ModelReport) -> Table:
    """What a pruning run did and how long it took."""
    table = facts_table(f"{report.recipe.words}, {report.sparsity}")
    account = report.account
    kept = sum(layer.kept * layer.parameters for layer in report.layers) / max(
        sum(layer.parameters for layer in report.layers), 1
    )
    table.add_row("layers pruned", str(len(report.layers)))
    table.add_row("weights kept in them", f"{kept:.1%}")
    table.add_row("in pruned layers, of the blocks' weights", f"{account.share('pruned'):.1%}")
    table.add_row("skipped (listed below)", f"{account.share('skipped'):.1%}")
    table.add_row("excluded by name", f"{account.share('excluded'):.1%}")
    table.add_row("outside the blocks, of the model's weights", f"{account.outside / account.model:.1%}")
    if report.budgets is not None:
        _add_shares(table, report)
    if report.rotation is not None:
        table.add_row("layers rotated", str(len(report.rotation.rotated)))
        table.add_row("change of their retained importance", f"{_mean_gain(report.rotation.rotated):+.2%}")
    if report.permutation is not None:
        table.add_row("layers reordered", str(len(report.permutation.reordered)))
        table.add_row("change of their retained score", f"{_mean_gain(report.permutation.reordered):+.2%}")
    if report.fits:
        before, after = (sum(getattr(fit, at) for fit in report.fits) / len(report.fits) for at in ("before", "after"))
        table.add_row("held-out error of a block, before its training", f"{before:.4f}")
        table.add_row("held-out error of a block, after it", f"{after:.4f}")
    rotate = ("rotate",) if report.rotation is not None else ()
    permute = ("permute",) if report.permutation is not None else ()
    update = ("update",) if report.update is not None else ()
    quantize = ("quantize",) if report.recipe.quantize is not None else ()
    fit = ("block_fit",) if report.fits else ()
    chosen = (*rotate, *permute, "select", *update, *quantize, *fit)
    for stage in ("load", "calibration", "statistics", *chosen, "other", "total"):
        table.add_row(_STAGE_LABELS.get(stage, stage), f"{getattr(report.seconds, stage):.2f} s")
    table.add_row("CPU time of the total, all threads", f"{report.cpu_seconds:.2f} s")
    table.add_row("peak memory", shown_bytes(report.peak_bytes))
    return table


def _mean_gain(layers: Sequence[Rotated | Reordered]) -> float:
    gains = [layer.after / layer.before - 1 for layer in layers if layer.before]
    return sum(gains) / max(len(gains), 1)


def _add_shares(table: Table, report: ModelReport) -> None:
    """Add how many layers have each n:m, or for a fraction the smallest and the largest share that a layer keeps."""
    if ":" in report.sparsity:
        for pattern, count in Counter(layer.pattern for layer in report.layers).most_common():
            table.add_row(f"layers at {pattern}", str(count))
    elif report.layers:
        shares = [layer.kept for layer in report.layers]
        table.add_row("kept in a layer, least to most", f"{min(shares):.1%} to {max(shares):.1%}")


def packing_table(report: SparsifyReport) -> Table:
    """The size of the packed layers, beside their dense size."""
    table = facts_table()
    kinds = Counter((layer.pattern, layer.bits) for layer in report.layers)
    for (pattern, bits), count in kinds.most_common():
        kind = "layers not pruned" if pattern == DENSE else f"layers packed {pattern}"
        table.add_row(kind + ("" if bits is None else f", {bits} bits"), str(count))
    table.add_row("size of these layers, dense", shown_bytes(report.dense_bytes))
    table.add_row("size packed", f"{shown_bytes(report.packed_bytes)} ({report.packed_bytes / report.dense_bytes:.1%})")
    return table


def skipped_lines(entries: Iterable[Skipped], most: int = 12) -> list[str]:
    """One line for each reason why weights were left dense, with their share of the model; largest share first."""
    layers: dict[str, list[Skipped]] = {}
    for skipped in entries:
        layers.setdefault(skipped.reason, []).append(skipped)
    ranked = sorted(layers.items(), key=lambda item: -sum(s.parameters for s in item[1]))
    lines = [
        f"{_first_of([s.name for s in of_reason])}: {reason} ({sum(s.share for s in of_reason):.1%} of the model's "
        "parameters)"
        for reason, of_reason in ranked
    ]
    if len(lines) > most:
        rest = [s for _, of_reason in ranked[most:] for s in of_reason]
        lines = [*lines[:most], f"and {len(rest)} more ({sum(s.share for s in rest):.1%})"]
    return lines


def unfolded_lines(report: ModelReport) -> list[str]:
    """One line for each reason why the inputs of some layers keep their order."""
    return _lines_by_reason(report.permutation.unfolded if report.permutation is not None else ())


def unrotated_lines(report: ModelReport) -> list[str]:
    """One line for each reason why the inputs of some output projections are not rotated."""
    return _lines_by_reason(report.rotation.unrotated if report.rotation is not None else ())


def _lines_by_reason(entries: Iterable[Unfolded]) -> list[str]:
    layers: dict[str, list[str]] = {}
    for unfolded in entries:
        layers.setdefault(unfolded.reason, []).append(unfolded.name)
    return [f"{_first_of(names)}: {reason}" for reason, names in layers.items()]


_RUNS = {
    "blocks": "run block by block",
    "forwards": "run by whole forwards of the model",
    "none": "not run: nothing had to be",
    "unreached": "left dense: no calibration input reaches it",
}


def tower_lines(report: ModelReport) -> list[str]:
    """One line for each tower, if there are several or an input does not reach one."""
    if len(report.towers) == 1 and report.towers[0].run != "unreached":
        return []
    return [f"tower {tower.name}: {tower.blocks} blocks, {_RUNS[tower.run]}" for tower in report.towers]


def outside_line(names: Sequence[str], most: int = 4) -> str:
    """The linear layers outside the blocks, the first few by name."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}: outside the blocks; --include names them to prune them too"


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def perplexity_table(result: Perplexity, facts: dict[str, str]) -> Table:
    """One perplexity, with further facts by name."""
    table = facts_table()
    table.add_row("perplexity", f"{result.perplexity:.3f}")
    table.add_row("windows", f"{result.windows} of {result.length} tokens")
    table.add_row("tokens predicted", f"{result.tokens:,}")
    table.add_row("bos", result.bos)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def task_table(scores: Sequence[TaskScore]) -> Table:
    """The scores of tasks."""
    table = headed_table("task", "metric", "score", "error", "questions", "examples", left=("task", "metric"))
    for entry in scores:
        error = "-" if entry.error is None else f"{entry.error:.4f}"
        counts = ("-" if count is None else str(count) for count in (entry.samples, entry.shots))
        table.add_row(entry.task, entry.metric, f"{entry.value:.4f}", error, *counts)
    return table


def info_table(tensors: Sequence[TensorSparsity]) -> Table:
    """Sparsity and pattern of every matrix."""
    table = headed_table("layer", "shape", "zeros", "pattern", left=("layer", "shape", "pattern"))
    for tensor in tensors:
        table.add_row(tensor.name.removesuffix(".weight"), _shape([tensor]), _zeros([tensor]), _pattern(tensor))
    return table


def info_groups(tensors: Sequence[TensorSparsity]) -> Table:
    """Like :func:`info_table`, with one row for layers with the same shape, pattern and name up to block numbers.

    Layers of one name with more than MOST_SHAPES shapes have one row, with the range of the shapes.
    """
    table = headed_table("layers", "shape", "count", "zeros", "pattern", left=("layers", "shape", "pattern"))
    kinds: dict[tuple[str, int, str], dict[tuple[int, ...], list[TensorSparsity]]] = {}
    for tensor in tensors:
        name = re.sub(r"\.\d+(?=\.)", ".*", tensor.name.removesuffix(".weight"))
        shapes = kinds.setdefault((name, len(tensor.shape), _pattern(tensor)), {})
        shapes.setdefault(tensor.shape, []).append(tensor)
    for (name, _, pattern), shapes in kinds.items():
        groups = list(shapes.values())
        for group in [list(chain(*groups))] if len(groups) > MOST_SHAPES else groups:
            table.add_row(name, _shape(group), str(len(group)), _zeros(group), pattern)
    return table


def history_table(history: Sequence[Mapping[str, Any]]) -> Table:
    """What each step that led to a model cost and brought; "-" for what was not measured."""
    headings = ("step", "what it did", "seconds", "what it brought")
    table = headed_table(*headings, left=("step", "what it did", "what it brought"))
    for step in history:
        seconds, zeros = step.get("seconds"), step.get("zeros")
        brought = [f"{zeros:,} weights are 0"] if isinstance(zeros, int) else []
        for name, (label, form) in _BROUGHT.items():
            match step.get(name):
                case [int() | float() as before, int() | float() as after] if before != after:
                    brought.append(f"{label} {before:{form}} -> {after:{form}}")
        time = f"{seconds:.0f}" if isinstance(seconds, (int, float)) else "-"
        table.add_row(step["command"], step["did"], time, "; ".join(brought))
    return table


_BROUGHT = {
    "parameters": ("parameters", ","),
    "bytes": ("bytes", ","),
    "perplexity": ("perplexity", ".2f"),
    "mean_loss": ("mean loss of first and last steps", ".3f"),
}
"""The facts of a step that have values before and after it, with their labels and formats."""


def _shape(tensors: Sequence[TensorSparsity]) -> str:
    """The shape of tensors; for an axis whose size differs, the smallest and the largest size."""
    sizes = [sorted(set(axis)) for axis in zip(*(tensor.shape for tensor in tensors), strict=True)]
    return " x ".join(str(size[0]) if len(size) == 1 else f"{size[0]} to {size[-1]}" for size in sizes)


def _is_rounded(tensor: TensorSparsity) -> bool:
    """True for a weight in few bits that is not pruned: its zeros are values that were rounded."""
    return tensor.bits is not None and tensor.pattern == DENSE


def _pruned(tensor: TensorSparsity) -> float:
    """Share of a weight's values that are pruned."""
    return 0.0 if _is_rounded(tensor) else tensor.zeros


def _zeros(tensors: Sequence[TensorSparsity]) -> str:
    """The mean share of pruned values; "-" if the tensors have only rounded zeros."""
    return "-" if all(map(_is_rounded, tensors)) else f"{sum(map(_pruned, tensors)) / len(tensors):.2%}"


def _pattern(tensor: TensorSparsity) -> str:
    few = "" if tensor.bits is None else f", {tensor.bits} bits"
    return f"{tensor.pattern}, packed{few}" if tensor.packed else tensor.pattern


def info_summary(tensors: Sequence[TensorSparsity]) -> str:
    """One line: share of zeros over all matrices, and how many have which pattern."""
    sizes = [math.prod(tensor.shape) for tensor in tensors]
    zeros = sum(size * _pruned(tensor) for size, tensor in zip(sizes, tensors, strict=True)) / max(sum(sizes), 1)
    kinds = (f"not pruned ({t.bits} bits)" if _is_rounded(t) else t.pattern for t in tensors)
    counted = ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).most_common())
    return f"{len(tensors)} matrices, {zeros:.1%} zeros: {counted}"
