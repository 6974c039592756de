"""Writes docs/benchmarks.md and docs/benchmarks.svg from benchmarks/results.csv (``make bench-report``)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..harness.layer_shapes import labels_of
from ..harness.results import Outcome, Result, load, outcomes

HEADINGS = ("operation", "layer", "dtype", "ours", "GB/s", "compared with", "its time", "times as long", "rounds")

PREAMBLE = """# Side by side

Written by `make bench-report` from `benchmarks/results.csv`, to which `make bench` appends. Every row is one
comparison. Both sides were timed in turn (A B A B) on the same input, after a check that they choose the same weights
and that the operation's tests pass; without that there is no ratio. Times are medians. GB/s counts the fewest bytes
that the operation can move. The published forms are those of `benchmarks/claims/published.py`, written from the
papers; they use the same statistics as ours.
"""


def cells(outcome: Outcome) -> Iterable[tuple[str, ...]]:
    """One row for each of the other providers."""
    ours = outcome.ours
    rate = f"{ours.bandwidth:.1f}" if ours.bytes else ""
    for other in outcome.others:
        ratio = outcome.speedups.get(other.provider)
        yield (
            *(ours.op, layer_of(ours), ours.dtype, time_of(ours), rate),
            *(other.provider, time_of(other)),
            f"{ratio:.{1 if ratio < 10 else 0}f}x" if ratio is not None else f"tests: {ours.tests}",
            str(ours.rounds),
        )


def layer_of(result: Result) -> str:
    """The shape, and the first model with such a layer."""
    sides = result.shape.split("x")
    labels = labels_of(*map(int, sides)) if len(sides) == 2 else []
    return " x ".join(sides) + (f" ({labels[0]})" if labels else "")


def time_of(result: Result) -> str:
    """The median, and on a GPU also the median by the wall clock."""
    return duration(result.p50) + (f" (wall {duration(result.wall)})" if result.wall else "")


def duration(seconds: float) -> str:
    """Seconds with three digits, in a suitable unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def outcome_table(found: Sequence[Outcome]) -> str:
    """The table for a terminal."""
    table = Table(*HEADINGS)
    for outcome in found:
        for row in cells(outcome):
            table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=160).print(table)
    return text.getvalue()


def page(found: Sequence[Outcome]) -> str:
    """docs/benchmarks.md."""
    lines = [PREAMBLE, "![seconds over size](benchmarks.svg)", ""]
    machines = dict.fromkeys((o.ours.setting.evidence, o.ours.setting.device, o.ours.setting.threads) for o in found)
    for evidence, device, threads in machines:
        there = [
            o
            for o in found
            if (o.ours.setting.evidence, o.ours.setting.device, o.ours.setting.threads) == (evidence, device, threads)
        ]
        last = there[-1].ours.setting
        versions = f"torch {last.torch}, triton {last.triton}, ace_triton {last.ace_triton}, {last.date[:10]}"
        title = f"## {evidence}: {device}, {threads} thread{'s' * (threads != 1)} ({versions})"
        lines += [title, "", *markdown_table(there), ""]
    return "\n".join(lines)


def markdown_table(found: Sequence[Outcome]) -> list[str]:
    """The table in Markdown, line by line."""
    rows = [f"| {' | '.join(row)} |" for outcome in found for row in cells(outcome)]
    return [f"| {' | '.join(HEADINGS)} |", "|---|---|---|---:|---:|---|---:|---:|---:|", *rows]


def plot(found: Sequence[Outcome], path: Path) -> None:
    """Plot seconds over the number of weights, with a panel for every pruning of layers."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ace_triton"
    from matplotlib import pyplot

    layers = [o for o in found if o.ours.op.startswith("prune ") and len(o.ours.shape.split("x")) == 2]
    names = list(dict.fromkeys(o.ours.op for o in layers))
    figure, panels = pyplot.subplots(
        1, max(len(names), 1), figsize=(3.2 * max(len(names), 1), 3.6), sharey=True, squeeze=False
    )
    for panel, name in zip(panels[0], names, strict=False):
        here = sorted((o for o in layers if o.ours.op == name), key=lambda o: _weights(o.ours))
        for side, marker in ((0, "o"), (1, "s")):
            shown = [o.results[side] for o in here if len(o.results) > side]
            middle = [result.p50 for result in shown]
            spread = [
                [result.p50 - result.p20 for result in shown],
                [result.p80 - result.p50 for result in shown],
            ]
            panel.errorbar(
                [_weights(result) for result in shown],
                middle,
                yerr=spread,
                marker=marker,
                linestyle="",
                label=shown[0].provider if shown else "",
            )
        panel.set(title=name, xscale="log", yscale="log", xlabel="weights of the layer")
        panel.grid(alpha=0.3)
        panel.legend(loc="upper left", fontsize="small")
    panels[0][0].set_ylabel("seconds, median; bars from the 20th to the 80th percentile")
    panels[0][0].yaxis.label.set_fontsize("small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _weights(result: Result) -> int:
    rows, cols = result.shape.split("x")
    return int(rows) * int(cols)


def main(
    results: Annotated[Path, typer.Option()] = Path("benchmarks/results.csv"),
    out: Annotated[Path, typer.Option(help="Where to write, without the suffix.")] = Path("docs/benchmarks"),
) -> None:
    """Write OUT.md and OUT.svg."""
    found = outcomes(load(results))
    if not found:
        raise typer.BadParameter(f"{results} has no results: run `make bench` or `make bench-quick` first")
    out.with_suffix(".md").write_text(page(found))
    plot(found, out.with_suffix(".svg"))


if __name__ == "__main__":
    typer.run(main)
