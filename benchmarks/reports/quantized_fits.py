"""The part of docs/quantization.md on fitted and recovered models: what their weights lose in 8 and 4 bits.

"absmax" rounds the finished weights, as ``ace-triton pack --bits`` does. "gptq" rounds while the model is pruned, as
``ace-triton prune --bits`` does; a recovery then trains with rounded forwards from there. A recovery without a rule
trains the unrounded fit with rounded forwards, as ``ace-triton recover --bits`` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ace_triton.packed.pattern import find_pattern
from ace_triton.recipe import Recipe
from ace_triton.recovery.settings import RecoverySettings
from ace_triton.solvers.quantize import Quantization, Rule, quantized_weight
from ace_triton.solvers.update import Update
from ace_triton.study.cells import Cell
from ace_triton.study.workbench import Workbench

from .pruned_weights import pruned_once

FIT, RECOVERED = "fit", "recovered"

Row = tuple[str, str, int, Rule | None, int]
"""Method, pattern, bits, rule, and number of optimizer steps of a recovery."""

OF_FIT: tuple[tuple[int, Rule | None], ...] = ((16, None), (8, "absmax"), (8, "gptq"), (4, "absmax"), (4, "gptq"))
OF_RECOVERY: tuple[tuple[int, Rule | None], ...] = (*OF_FIT, (8, None), (4, None))

SHOWN: dict[tuple[int, Rule | None], str] = {
    (16, None): "16 bits",
    (8, "absmax"): "8 bits, rounded at the end",
    (8, "gptq"): "8 bits, gptq",
    (8, None): "8 bits, rounded in the recovery",
    (4, "absmax"): "4 bits, rounded at the end",
    (4, "gptq"): "4 bits, gptq",
    (4, None): "4 bits, rounded in the recovery",
}


def cells(patterns: Sequence[str], steps: int) -> list[Row]:
    """All rows of these patterns: fits, and recoveries of a number of steps; 0 leaves recoveries out."""
    fits: list[Row] = [(FIT, pattern, *column, 0) for pattern in patterns for column in OF_FIT]
    if not steps:
        return fits
    return fits + [(RECOVERED, pattern, *column, steps) for pattern in patterns for column in OF_RECOVERY]


def measured(
    bench: Workbench, rows: Sequence[Row], group: int, length: int, seed: int, kept: Path | None
) -> Iterator[tuple[Row, float]]:
    """Perplexities of rows. Rows of one pruning, and of one recovery, are measured together.

    Args:
        bench: the model and its texts.
        rows: what to measure.
        group: number of inputs that share a scale.
        length: length of the calibration sequences.
        seed: random seed of the calibration and of the recovery.
        kept: folder that keeps pruned weights; None keeps none.
    """
    for method, pattern, steps in dict.fromkeys((row[0], row[1], row[4]) for row in rows):
        wanted = [row for row in rows if (row[0], row[1], row[4]) == (method, pattern, steps)]
        ended = [row for row in wanted if row[3] == "absmax" or row[2] == 16]
        if ended:
            with _made(bench, pattern, None, None, steps, (length, seed), kept):
                weights = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
                for row in ended:
                    bench.model.load_state_dict(weights)
                    if row[3] is not None:
                        quantize(bench.model, Quantization(row[2], group, row[3]))
                    yield row, bench.perplexity()
        for row in wanted:
            if row not in ended:
                bits, rule = row[2:4]
                pruned_by = None if rule is None else Quantization(bits, group, rule)
                trained_by = Quantization(bits, group, "absmax")
                with _made(bench, pattern, pruned_by, trained_by, steps, (length, seed), kept):
                    yield row, bench.perplexity()


@contextmanager
def _made(
    bench: Workbench,
    pattern: str,
    pruned_by: Quantization | None,
    trained_by: Quantization | None,
    steps: int,
    calibration: tuple[int, int],
    kept: Path | None,
) -> Iterator[None]:
    """The bench's model pruned and fitted, and recovered if there are steps."""
    recipe = Recipe("wanda", sparsity=pattern, permute=True, update=Update(), quantize=pruned_by)
    with pruned_once(bench, Cell(recipe, *calibration), kept):
        if steps:
            settings = RecoverySettings(
                steps=steps, seed=calibration[1], forward_dtype=torch.float32, quantize=trained_by
            )
            bench.recover(settings)
        yield


@torch.no_grad()
def quantize(model: nn.Module, by: Quantization) -> None:
    """Round the pruned layers of a model to the nearest values, in place."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not find_pattern(layer.weight).dense:
            weight = layer.weight
            weight.copy_(quantized_weight(weight.float(), weight != 0, None, by, weight.dtype))


def section(found: Mapping[Row, float]) -> list[str]:
    """A table of one model: one row per way to round, one column per pattern, fit and recovery."""
    columns = list(dict.fromkeys((row[1], row[0], row[4]) for row in found if row[0] in (FIT, RECOVERED)))
    if not columns:
        return []
    columns.sort(key=lambda column: (column[0], column[2]))
    heads = [f"{pattern}, {name}" + (f" for {steps} steps" if steps else "") for pattern, name, steps in columns]
    lines = [
        '"Fit" is Wanda with reordered channels and a least-squares fit; the recoveries start from it. "Rounded at the '
        'end" rounds the finished weights, as `ace-triton pack --bits` does. "gptq" rounds while the model is pruned; '
        'a recovery of it rounds at the start and after each step. "Rounded in the recovery" starts from the '
        "unrounded fit, as `ace-triton recover --bits` does. "
        "The number in parentheses is the change from 16 bits in the same column.",
        "",
        f"| weights | {' | '.join(heads)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for (bits, rule), label in SHOWN.items():
        shown = []
        for pattern, name, steps in columns:
            value, base = (found.get((name, pattern, *key, steps)) for key in ((bits, rule), (16, None)))
            change = "" if bits == 16 or value is None or base is None else f" ({value / base - 1:+.1%})"
            shown.append("" if value is None else f"{value:.2f}{change}")
        if any(shown):
            lines.append(f"| {label} | {' | '.join(shown)} |")
    return [*lines, ""]
