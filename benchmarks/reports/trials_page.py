"""docs/trials.md: one section for each idea, with its verdict."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ace_triton.study.tally import listed

from .trial_metric import NAME
from .trial_rows import ALONE, FIT, PATTERN_FITS, ROWS, Idea, Row

Entry = Mapping[str, Any]
"""A result in the record."""

LEAST_GAIN = 0.02
"""The relative fall of perplexity from which an idea pays."""

LEAST_GAIN_ALONE = 0.10
"""The same for exchanges without a fit, since a fit gains more in as much time."""

MOST_TIME = 2.0
"""The CPU time that exchanges without a fit may take, over that of the metric alone."""

IDEAS: tuple[tuple[Idea, str, str], ...] = (
    (
        "exchanges",
        "Exchanges of kept and pruned weights",
        "In each group of n:m and each row, a kept and a pruned weight change places if that lowers the layer's output "
        "error; the best pair is taken (SparseSwaps, arXiv 2512.10922). The error comes from the Gram matrix of the "
        "layer's input, so each exchange is valued exactly. Without a fit, weights keep their dense values, and there "
        "are three passes over all groups, or one. After a fit there are two, each followed by conjugate gradients; "
        "more mask rounds of the fit are another use of that time.",
    ),
    (
        "centered",
        "Centered statistics",
        "From the Gram matrix of T tokens, c T times the outer product of their mean is subtracted, for the score or "
        "for the fit. The score with c = 1 is STADE's. The mean error of a layer can move into its bias. Most layers "
        "of these models have no bias: with biases in every layer, a model is no checkpoint of its architecture.",
    ),
    (
        "low rank",
        "A low-rank product beside the sparse weights",
        "What pruning took from a layer's weight is replaced by a product of two thin matrices in bf16, which "
        'minimizes the layer\'s output error. "Twice" fits the sparse weights again to what the product leaves, and '
        "then the product. Bytes are those of the packed layers (values in bf16, one bit a weight, and the factors), "
        "as a share of the dense layers in bf16. A product is compared with the best fitted pattern of at most as many "
        "bytes, which may be one that GPUs have no instructions for.",
    ),
)


@dataclass(frozen=True)
class Compared:
    """A row of a model with a seed, and the row that it is compared with.

    Attributes:
        row: what was pruned.
        base: name of the row that it is compared with; None if there is none.
        results: entries of the record for this row and for the base, whole models.
        layers: the same for single layers. Both are None if they are not measured.
        model, seed: of both rows.
    """

    row: Row
    base: str | None
    results: tuple[Entry | None, Entry | None]
    layers: tuple[Entry | None, Entry | None]
    model: str
    seed: int

    @property
    def change(self) -> float | None:
        """Relative change of perplexity; None if it is not measured."""
        return _change(*self.results, "perplexity")

    @property
    def error_change(self) -> float | None:
        """Relative change of the layers' output error; None if it is not measured."""
        return _change(*self.layers, "error")

    @property
    def time(self) -> float:
        """CPU seconds over those of the base: of whole models, or of layers."""
        change = _change(*self.results, "seconds")
        return 1 + (change if change is not None else _change(*self.layers, "seconds") or 0.0)


def _change(entry: Entry | None, base: Entry | None, key: str) -> float | None:
    return None if entry is None or base is None else float(entry[key] / base[key] - 1)


def compared(record: Mapping[str, Any], model: str, idea: Idea) -> list[Compared]:
    """The measured rows of an idea and their bases, by seed and in the order of the rows."""
    whole, layers = (
        {(entry["row"], entry["seed"]): entry for entry in record[kind] if entry["model"] == model}
        for kind in ("results", "layers")
    )
    pairs = []
    bases = {row.base for row in ROWS if row.idea == idea}
    for seed in sorted({seed for _, seed in layers}):
        for row in ROWS:
            key = (row.name, seed)
            if (row.idea == idea or row.name in bases) and key in layers:
                name = _base_of(row, seed, layers) if row.idea == idea else None
                base = name or "", seed
                results, errors = (whole.get(key), whole.get(base)), (layers.get(key), layers.get(base))
                pairs.append(Compared(row, name, results, errors, model, seed))
    return pairs


def _base_of(row: Row, seed: int, layers: Mapping[tuple[str, int], Entry]) -> str | None:
    """The row's base; for a low-rank product, the measured pattern with the most bytes that has no more than it."""
    if row.idea != "low rank" or not row.recipe.complete_options.get("rank"):
        return row.base
    patterns = [other.name for other in ROWS if other.name in PATTERN_FITS and (other.name, seed) in layers]
    bytes_of = {name: layers[name, seed]["bytes"] for name in patterns}
    fitting = [name for name in patterns if bytes_of[name] <= layers[row.name, seed]["bytes"]]
    return max(fitting, key=lambda name: bytes_of[name], default=None)


def page(record: Mapping[str, Any]) -> str:
    """docs/trials.md."""
    machines = sorted({entry["processor"] for entry in [*record["results"], *record["layers"]]})
    dense = listed([f"{model['dense']:.2f} for {name}" for name, model in record["models"].items()])
    windows = listed([f"{model['windows']} for {name}" for name, model in record["models"].items()])
    lines = [
        "# Ideas that were measured",
        "",
        f"Measured by `make trials` on a CPU ({listed(machines)}) in float32: 64 x 128 calibration tokens of C4, and "
        f"windows of 512 tokens of WikiText-2 ({windows}). Perplexity of the dense models: {dense}. "
        '"fit" is Wanda, permuted, with `--update lstsq`. Times are CPU seconds of pruning, all threads together, '
        "beside other work on the machine. Compare them within a table only.",
        "",
        "Output errors are those of the layers of two blocks of the dense model, pruned alone and without a "
        "permutation: the squared error on 2,048 tokens of WikiText-2 over the squared outputs, as the geometric mean "
        "of the layers. A row without a perplexity was measured on these layers only.",
        "",
        f"The rule: an idea pays if perplexity falls by {LEAST_GAIN:.0%} or more. Exchanges without a fit must gain "
        f"{LEAST_GAIN_ALONE:.0%} in at most {MOST_TIME:g} times the time, because a fit gains more in such a time. An "
        "idea is tried on whole models only if it gains as much in the output errors of the layers.",
    ]
    for idea, title, description in IDEAS:
        lines += ["", f"## {title}", "", description]
        everything: list[Compared] = []
        for name in record["models"]:
            if pairs := compared(record, name, idea):
                lines += ["", f"{name}:", "", *table(idea, pairs)]
                everything += pairs
        lines += ["", verdict(idea, everything)]
    return "\n".join(lines) + "\n"


def table(idea: Idea, pairs: Sequence[Compared]) -> list[str]:
    """The rows of an idea and those that they are compared with."""
    head = "bytes | " if idea == "low rank" else ""
    lines = [
        f"| | seed | {head}perplexity | change | CPU seconds | output error | change | CPU seconds |",
        f"|---|---:|{'---:|' if head else ''}---:|---:|---:|---:|---:|---:|",
    ]
    for pair in pairs:
        share = f"{_shown(pair.layers[0], 'bytes', '.1%')} | " if head else ""
        cells = [
            _shown(pair.results[0], "perplexity", ".1f"),
            _percent(pair.change),
            _shown(pair.results[0], "seconds", ",.0f"),
            _shown(pair.layers[0], "error", ".4f"),
            _percent(pair.error_change),
            _shown(pair.layers[0], "seconds", ",.1f"),
        ]
        lines.append(f"| {pair.row.name} | {pair.seed} | {share}{' | '.join(cells)} |")
    return lines


def _shown(entry: Entry | None, key: str, form: str) -> str:
    return "" if entry is None else format(entry[key], form)


def _percent(change: float | None) -> str:
    return "" if change is None else f"{change:+.1%}"


def verdict(idea: Idea, pairs: Sequence[Compared]) -> str:
    """Whether each row of an idea pays."""
    rows: dict[str, list[Compared]] = {}
    for pair in pairs:
        if pair.base is not None:
            rows.setdefault(pair.row.name, []).append(pair)
    if not rows:
        return "Not measured yet."
    lines = [_line(idea, of_row) for of_row in rows.values()]
    return "\n".join([*lines, *(_beside_the_fit(pairs) if idea == "exchanges" else [])])


def _beside_the_fit(pairs: Sequence[Compared]) -> list[str]:
    """What the fit reaches from the same start as exchanges without a fit."""
    found = {(pair.row.name, pair.model, pair.seed): pair for pair in pairs}
    lines = []
    for (name, model, seed), fitted in found.items():
        alone = found.get((ALONE, model, seed))
        if name != FIT or alone is None:
            continue
        beside = replace(
            fitted, results=(fitted.results[0], alone.results[0]), layers=(fitted.layers[0], alone.layers[0])
        )
        changes = (("perplexity", beside.change), ("output error of layers", beside.error_change))
        said = [f"{what} {change:+.1%}" for what, change in changes if change is not None]
        if said:
            time = f"{beside.time:.1f} times its CPU time"
            lines.append(f"- For comparison, {FIT} on {model}: {listed(said)} against {ALONE}, {time}.")
    return lines


def _line(idea: Idea, pairs: Sequence[Compared]) -> str:
    """The verdict on a row, from all its models and seeds."""
    row = pairs[0].row
    whole = [pair for pair in pairs if pair.change is not None]
    used = whole or [pair for pair in pairs if pair.error_change is not None]
    if not used:
        return f"- {row.name}: not measured beside {pairs[0].base} yet."
    changes = [pair.change if whole else pair.error_change for pair in used]
    change = statistics.fmean(change for change in changes if change is not None)
    time = statistics.fmean(pair.time for pair in used)
    what = "perplexity" if whole else "output error of layers"
    count = len({(pair.model, pair.seed) for pair in used})
    where = f"{listed(sorted({pair.model for pair in used}))}, {count} {'runs' if count > 1 else 'run'}"
    base = listed(sorted({pair.base or "" for pair in used}))
    text = f"- {row.name}: {what} {change:+.1%} against {base}, {time:.1f} times its CPU time ({where})."
    if row.recipe.method != NAME:
        return f"{text} This is an option of the package (`mask_rounds`)."
    least = LEAST_GAIN_ALONE if idea == "exchanges" and row.base == ALONE else LEAST_GAIN
    if change > -least:
        return f"{text} It does not pay{'' if whole else ' on these layers'}: a fall of {least:.0%} would."
    if not whole:
        return f"{text} Whole models are to decide."
    if idea == "exchanges" and row.base == ALONE and time > MOST_TIME:
        return f"{text} It falls enough, but takes more than {MOST_TIME:g} times as long, so it does not pay."
    return f"{text} It pays by this rule."
