"""Times of the CPU operations on one core, against plain passes over the same bytes and against published forms.

    python -m benchmarks.reports.cpu_ratios [--rounds 15] [--out docs/cpu]

A ratio is one of medians of this process's CPU time (user and system). Both sides alternate in every round, so that a
change of clock frequency affects both. Weights are restored before every call, untimed. Writes OUT.md and OUT.json,
which keep the results of each processor and instruction set; a run replaces those of its own.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ace_triton.commands.report import write_json
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm

from .cpu_comparisons import DTYPES, SECTIONS, SHAPE, Comparison
from .machines import find_machine, this_machine, title
from .record import read_record

SLOW_ROUNDS = 3


@dataclass(frozen=True)
class Ratio:
    """A measured comparison; ``ratio`` is theirs over ours if the target is ``at_least``, else ours over theirs."""

    what: str
    against: str
    dtype: str
    milliseconds: float
    baseline_milliseconds: float
    ratio: float
    target: str
    met: bool


def main(
    rounds: Annotated[int, typer.Option(help="Number of rounds of each comparison; slow baselines take three.")] = 15,
    out: Annotated[Path, typer.Option(help="Where to write, without the suffix.")] = Path("docs/cpu"),
) -> None:
    """Measure every ratio, print a table, write OUT.md and OUT.json."""
    torch.set_num_threads(1)
    ratios = []
    console = Console(width=140)
    for label, dtype in DTYPES.items():
        for comparisons in SECTIONS:
            for comparison in comparisons(label, dtype):
                ratios.append(measure(comparison, rounds))
                console.print(line(ratios[-1]))
    ratios.append(call_overhead())
    console.print(table(ratios))
    record = read_record(out.with_suffix(".json"), machines=[])
    add_machine(record, environment(), ratios)
    write_json(out.with_suffix(".json"), record)
    out.with_suffix(".md").write_text(markdown(record))


def add_machine(record: dict[str, Any], facts: Mapping[str, str], ratios: Sequence[Ratio]) -> None:
    """Add the results of a machine to a record, in place of those of the same processor and instruction set."""
    found = {"environment": dict(facts), "ratios": [asdict(ratio) for ratio in ratios]}
    earlier = find_machine(record["machines"], facts)
    if earlier is None:
        record["machines"].append(found)
    else:
        earlier.update(found)


def measure(comparison: Comparison, rounds: int) -> Ratio:
    """Time both sides in turn."""
    slow = comparison.at_least is not None
    sides = (comparison.call, comparison.baseline)
    times: tuple[list[float], list[float]] = ([], [])
    for count in range((SLOW_ROUNDS if comparison.few_rounds else rounds) + 1):
        for side, spent in zip(sides, times, strict=True):
            comparison.restore()
            start = time.process_time()
            side()
            if count > 0:
                spent.append(time.process_time() - start)
    ours, theirs = (statistics.median(spent) for spent in times)
    ratio = theirs / ours if slow else ours / theirs
    if slow:
        target, met = f">= {comparison.at_least:g}" if comparison.at_least else "", ratio >= comparison.at_least
    else:
        target = "" if comparison.at_most is None else f"<= {comparison.at_most:g}"
        met = comparison.at_most is None or ratio <= comparison.at_most
    return Ratio(
        comparison.what, comparison.against, comparison.dtype, ours * 1e3, theirs * 1e3, round(ratio, 2), target, met
    )


def call_overhead() -> Ratio:
    """The cost of a call on a tiny weight, against 20 microseconds."""
    weight, terms, calls = torch.randn(4, 16), ScoreTerms(scale=torch.ones(16)), 2000
    start = time.process_time()
    for _ in range(calls):
        select_nm(weight, terms, 2, 4)
    each = (time.process_time() - start) / calls * 1e3
    return Ratio(
        "one call of select_nm on 4 x 16", "20 microseconds", "fp32", each, 0.02, each / 0.02, "<= 1", each <= 0.02
    )


def environment() -> dict[str, str]:
    """What the times were measured on."""
    return {
        **this_machine(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "weight": " x ".join(map(str, SHAPE)),
    }


def cells(ratio: Ratio) -> tuple[str, ...]:
    """One row of a table."""
    target = f"{ratio.target}{'' if ratio.met else ' (missed)'}"
    times = (milliseconds(ratio.milliseconds), milliseconds(ratio.baseline_milliseconds))
    return ratio.what, ratio.against, ratio.dtype, *times, f"{ratio.ratio:.{2 if ratio.ratio < 10 else 0}f}x", target


def milliseconds(value: float) -> str:
    """Three digits without an exponent."""
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


HEADINGS = ("what", "against", "dtype", "time", "baseline", "ratio", "target")


def line(ratio: Ratio) -> str:
    """One comparison in a line."""
    return "  ".join(cells(ratio))


def table(ratios: list[Ratio]) -> Table:
    """All comparisons, for a terminal."""
    shown = Table(*HEADINGS, title="CPU time on one core")
    for ratio in ratios:
        shown.add_row(*cells(ratio))
    return shown


def markdown(record: Mapping[str, Any]) -> str:
    """docs/cpu.md."""
    lines = [PREAMBLE]
    for machine in record["machines"]:
        facts, ratios = machine["environment"], [Ratio(**ratio) for ratio in machine["ratios"]]
        lines += [f"## {title(facts)}", "", setting(facts, ratios), ""]
        lines += [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
        lines += [f"| {' | '.join(cells(ratio))} |" for ratio in ratios]
        lines.append("")
    return "\n".join(lines)


def setting(facts: Mapping[str, str], ratios: Sequence[Ratio]) -> str:
    """What a machine's results were measured with, and how many targets it meets."""
    aimed = [ratio for ratio in ratios if ratio.target]
    met = sum(ratio.met for ratio in aimed)
    threads = f"{facts['threads']} thread{'' if facts['threads'] == '1' else 's'}"
    return (
        f"A weight of {facts['weight']}; {threads}, torch {facts['torch']}, Python {facts['python']}. "
        f"{met} of this project's {len(aimed)} targets for these times are met."
    )


PREAMBLE = """# What the CPU library costs

Measured on a CPU by `make figures`. Times are medians of CPU time (user and system) on one core; the two sides of a row
alternate. Against a pass or a read, the ratio is our time over theirs: less is better, and targets start with <=.
Against a published form or a dense product, it is their time over ours: more is better, and targets start with >=.
Weights are restored before every call, untimed.

A plain read is `all_finite`, the fastest read in this package: one load, one AND and one maximum per register, and no
store. The row of `torch.sum` shows that torch's own read is no faster. Statistics include the tensors they return: with
16 tokens in a sequence, `moments` also writes a sixteenth of the elements it reads, in fp32.

Each run keeps the results of other processors and instruction sets. How far memory limits a ratio depends on the
processor.
"""


if __name__ == "__main__":
    typer.run(main)
