"""Times of the CPU operations on one core, against plain passes over the same bytes and against published forms.

    python -m benchmarks.reports.cpu_ratios [--rounds 15] [--out docs/cpu]

A ratio is one of medians of this process's CPU time (user and system). Both sides alternate in every round, so that a
change of clock frequency affects both. Weights are restored before every call, untimed. Writes OUT.md and OUT.json.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from ace_triton import ActivationStats, Sparsity, prune_linear
from ace_triton.commands.report import write_json
from ace_triton.kernels import cpu, cpu_library
from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.moments import moments
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import pack_nm, pack_scored
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.kernels.weight_sums import weight_sums
from ace_triton.methods.wanda_ria import ria, wanda
from benchmarks.claims.published import prune_groups, prune_rows_by_sort, prune_rows_by_topk, wanda_scores

SHAPE = (4096, 11008)
TOKENS = ((512, 16, 4096), (64, 128, 4096), (4, 2048, 4096), (2, 2048, 11008))
SMOLLM2_BLOCKS = 30
SMOLLM2_SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
# The first layer of each distinct input: q, k and v read one tensor, then o, then gate and up, then down.
SMOLLM2_INPUTS = (0, 3, 4, 6)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLOW_ROUNDS = 3

Call = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """Two calls to time in turn.

    Attributes:
        what, against: names of the two sides.
        dtype: type of the weight or the tokens.
        call, baseline: the two sides.
        restore: runs untimed before each side.
        at_most: target for the time of ``call`` over that of ``baseline``.
        at_least: target for the inverse, if the baseline is the slow side.
        few_rounds: take SLOW_ROUNDS, for a baseline that takes seconds.
    """

    what: str
    against: str
    dtype: str
    call: Call
    baseline: Call
    restore: Call
    at_most: float | None = None
    at_least: float | None = None
    few_rounds: bool = False


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
    facts = environment()
    write_json(out.with_suffix(".json"), {"environment": facts, "ratios": [asdict(ratio) for ratio in ratios]})
    out.with_suffix(".md").write_text(markdown(facts, ratios))


def against_passes(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """One-pass operations against an in-place multiplication by 1, or a read."""
    torch.manual_seed(0)
    dense = torch.randn(SHAPE).mul_(0.02).to(dtype)
    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=dtype)
    weight = layer.weight.detach()
    stats = ActivationStats.from_tokens(torch.randn(8, 32, SHAPE[1]))

    def restore() -> None:
        weight.copy_(dense)

    plain, relative = wanda(dense, stats), ria(dense, stats)
    narrow = dtype != torch.float32
    passes, reads = "`weight.mul_(1)`", "plain read"

    def multiply() -> object:
        return weight.mul_(1)

    def read() -> object:
        return all_finite(weight)

    def compare(what: str, against: str, call: Call, at_most: float | None = None) -> Comparison:
        return Comparison(what, against, label, call, multiply if against == passes else read, restore, at_most)

    yield compare("2:4 in place, Wanda's terms", passes, lambda: select_nm(weight, plain, 2, 4), 2.2 if narrow else 1.6)
    yield compare("2:4 in place, RIA's terms", passes, lambda: select_nm(weight, relative, 2, 4))
    yield compare("4:8 in place, Wanda's terms", passes, lambda: select_nm(weight, plain, 4, 8))
    yield compare("50 % of each row, Wanda's terms", passes, lambda: select_rows(weight, plain, SHAPE[1] // 2))
    yield compare("weight_sums", reads, lambda: weight_sums(weight))
    yield compare("torch.sum", reads, lambda: weight.sum())
    for method in ("wanda", "ria"):
        target = (3.2 if narrow else 2.5) if method == "wanda" else None
        yield compare(
            f"prune_linear, 2:4, {method}",
            passes,
            lambda method=method: prune_linear(layer, stats, method=method, sparsity="2:4"),
            target,
        )


def against_published(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """Selections against the published ones, including the scores on both sides."""
    torch.manual_seed(0)
    dense = torch.randn(SHAPE).mul_(0.02).to(dtype)
    weight, mean_square = dense.clone(), torch.rand(SHAPE[1]) + 0.1
    terms, half = ScoreTerms(scale=mean_square.sqrt()), SHAPE[1] // 2

    def restore() -> None:
        weight.copy_(dense)

    def rows() -> object:
        return select_rows(weight, terms, SHAPE[1] - half)

    def compare(what: str, against: str, call: Call, baseline: Call, at_least: float) -> Comparison:
        return Comparison(what, against, label, call, baseline, restore, at_least=at_least, few_rounds=True)

    yield compare(
        "2:4 in place",
        "published loop over groups",
        lambda: select_nm(weight, terms, 2, 4),
        lambda: prune_groups(weight, wanda_scores(weight, mean_square), 2, 4),
        100,
    )
    for against, prune, at_least in (("top-k and scatter", prune_rows_by_topk, 15), ("sort", prune_rows_by_sort, 45)):
        yield compare(
            "50 % of each row",
            against if prune is prune_rows_by_topk else "published stable sort",
            rows,
            lambda prune=prune: prune(weight, wanda_scores(weight, mean_square), half),
            at_least,
        )


def over_tokens(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """Statistics against a read of the same tokens."""
    for shape in TOKENS:
        tokens = torch.randn(shape).to(dtype)
        yield Comparison(
            f"moments of {' x '.join(map(str, shape))}",
            "plain read",
            label,
            lambda tokens=tokens: moments(tokens),
            lambda tokens=tokens: all_finite(tokens),
            lambda: None,
            1.3 if dtype == torch.float32 else 2.0,
        )


def over_small_layers(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """Score and mask of SmolLM2-135M's 210 layers, one by one."""
    weights = [torch.randn(shape).to(dtype) for _ in range(SMOLLM2_BLOCKS) for shape in SMOLLM2_SHAPES]
    terms = {cols: ScoreTerms(scale=torch.rand(cols) + 0.1) for _, cols in SMOLLM2_SHAPES}
    yield Comparison(
        "2:4 of SmolLM2-135M's 210 layers",
        "`mul_(1)` of each",
        label,
        lambda: [select_nm(weight, terms[weight.shape[1]], 2, 4) for weight in weights],
        lambda: [weight.mul_(1) for weight in weights],
        lambda: None,
        4.0,
    )


def over_a_model(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """Score and mask of all of SmolLM2-135M: terms, checks and selection.

    Layers that read one input share its statistics, which come from 128 sequences and have nothing derived yet.
    """
    blocks = [
        [nn.Linear(cols, rows, bias=False, dtype=dtype) for rows, cols in SMOLLM2_SHAPES] for _ in range(SMOLLM2_BLOCKS)
    ]
    weights = [layer.weight.detach() for block in blocks for layer in block]
    tokens = {cols: torch.randn(128, 16, cols) for _, cols in SMOLLM2_SHAPES}
    seen = {cols: ActivationStats.from_tokens(x) for cols, x in tokens.items()}
    outputs = {
        shape: ActivationStats.from_tokens(tokens[shape[1]], layer=nn.Linear(shape[1], shape[0])).outputs
        for shape in SMOLLM2_SHAPES
    }
    fresh: list[list[ActivationStats]] = []
    pattern = Sparsity("2:4")

    def forget() -> None:
        fresh[:] = [[seen[SMOLLM2_SHAPES[first][1]].to("cpu") for first in SMOLLM2_INPUTS] for _ in blocks]

    def prune_all(method: str) -> None:
        for block, inputs in zip(blocks, fresh, strict=True):
            for index, (layer, shape) in enumerate(zip(block, SMOLLM2_SHAPES, strict=True)):
                stats = inputs[sum(first <= index for first in SMOLLM2_INPUTS) - 1]
                prune_linear(layer, stats.with_outputs(outputs[shape]), method, pattern)

    for method in ("wanda", "ria", "ace"):
        yield Comparison(
            f"prune_linear of SmolLM2-135M's 210 layers, {method}",
            "`mul_(1)` of each",
            label,
            lambda method=method: prune_all(method),
            lambda: [weight.mul_(1) for weight in weights],
            forget,
            4.0,
        )


def packed_products(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """2:4 products of few rows against the same loop over the dense weight and against torch; packing against a pass.

    The weights are larger than any cache.
    """
    torch.manual_seed(0)
    weight = torch.randn(SHAPE).mul_(0.02).to(dtype)
    terms = ScoreTerms(scale=torch.rand(SHAPE[1]) + 0.1)
    packed = pack_scored(weight, terms, 2, 4)
    for rows in (1, 4, 16):
        tokens = torch.randn(rows, SHAPE[1]).to(dtype)
        dense: Call = lambda tokens=tokens: cpu.dense_linear(tokens, weight)  # noqa: E731
        torchs: Call = lambda tokens=tokens: nn.functional.linear(tokens, weight)  # noqa: E731
        of_dense = (1.7 if dtype == torch.float32 else 1.25) if rows == 1 else 0.0
        for against, baseline, at_least in (
            ("the same loop, dense", dense, of_dense),
            ("`F.linear`", torchs, 2.0 if rows == 1 else 0.0),
        ):
            yield Comparison(
                f"nm_linear 2:4, {rows} row{'s' * (rows > 1)}",
                against,
                label,
                lambda tokens=tokens: nm_linear(tokens, packed),
                baseline,
                lambda: None,
                at_least=at_least,
            )
    pruned = select_nm(weight.clone(), terms, 2, 4)
    into = torch.empty_like(weight)
    for what, call in (
        ("pack_scored 2:4", lambda: pack_scored(weight, terms, 2, 4)),
        ("pack_nm 2:4", lambda: pack_nm(pruned, 2, 4)),
        ("unpack_nm 2:4", lambda: unpack_nm(packed, into)),
    ):
        yield Comparison(what, "`weight.mul_(1)`", label, call, lambda: weight.mul_(1), lambda: None)


SECTIONS = (against_passes, against_published, packed_products, over_tokens, over_small_layers, over_a_model)


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
        "processor": processor(),
        "instruction set": cpu_library.isa(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "weight": " x ".join(map(str, SHAPE)),
    }


def processor() -> str:
    """The processor's name, with family and model if Linux reports them."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    first = cpuinfo.read_text().split("\n\n")[0]
    facts = dict([part.strip() for part in row.split(":", 1)] for row in first.splitlines() if ":" in row)
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


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


def markdown(facts: dict[str, str], ratios: list[Ratio]) -> str:
    """docs/cpu.md."""
    environment_rows = [f"| {name} | {value} |" for name, value in facts.items()]
    rows = [f"| {' | '.join(cells(ratio))} |" for ratio in ratios]
    return "\n".join([PREAMBLE, *environment_rows, "", f"| {' | '.join(HEADINGS)} |", f"|{'---|' * 7}", *rows, ""])


PREAMBLE = """# What the CPU library costs

Measured on a CPU by `make figures`. Times are medians of CPU time (user and system) on one core; the two sides of a row
alternate. Against a pass or a read, the ratio is our time over theirs. Against a published form or a dense product, it
is their time over ours. Weights are restored before every call, untimed.

A plain read is `all_finite`, the fastest read in this package: one load, one AND and one maximum per register, and no
store. The row of `torch.sum` shows that torch's own read is no faster. Statistics include the tensors they return: with
16 tokens in a sequence, `moments` also writes a sixteenth of the elements it reads, in fp32.

| | |
|---|---|"""


if __name__ == "__main__":
    typer.run(main)
