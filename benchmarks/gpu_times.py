"""Device times of every operation on the GPU at hand, beside a plain pass over the same bytes.

    python -m benchmarks.gpu_times [--device cuda] [--quick] [--out docs/gpu.json]

Each figure is the median over rounds of one call between two events on the stream, with the L2 cache overwritten before
it; operations are interleaved, so that a change of clocks meets them all. On a CPU (a dry run of this script)
it is wall time, and says nothing of a GPU.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ace_triton import ActivationStats
from ace_triton.kernels.coupling import coupling
from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.moments import moments
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.weight_sums import weight_sums
from ace_triton.kernels.weighted_squares import weighted_squares
from ace_triton.metrics import ria, wanda
from ace_triton.report import write_json

SHAPES = {"LLaMA-7B up": (11008, 4096), "Llama-3-8B up": (14336, 4096), "Qwen2.5-7B down": (3584, 18944)}
N_TOKENS = 8192
FLUSHED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """One operation at one shape.

    Attributes:
        operation, shape, dtype: what ran.
        microseconds: median time of a call.
        least_bytes: the fewest bytes it must move.
        bandwidth: least_bytes over the time, in GB/s.
        against_pass: its time over that of an in-place pass (``mul_(1)``) over the same matrix.
    """

    operation: str
    shape: str
    dtype: str
    microseconds: float
    least_bytes: int
    bandwidth: float
    against_pass: float


@dataclass(frozen=True)
class Operation:
    """A call to time, the fewest bytes it moves, the pass it is compared with, and what to do before it."""

    name: str
    call: Callable[[], object]
    least_bytes: int
    matrix: str
    restore: Callable[[], object]


def main(
    device: Annotated[str, typer.Option()] = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="One small shape and few rounds: does it run?")] = False,
    out: Annotated[Path, typer.Option()] = Path("docs/gpu.json"),
) -> None:
    """Time every operation, print a table and write OUT."""
    shapes = {"small": (256, 512)} if quick else SHAPES
    rounds = 3 if quick else 30
    timings = []
    for label, shape in shapes.items():
        for dtype in (torch.bfloat16, torch.float32):
            timings += measure(label, shape, dtype, torch.device(device), rounds, 64 if quick else N_TOKENS)
    facts = environment(torch.device(device))
    write_json(out, {"environment": facts, "timings": [asdict(timing) for timing in timings]})
    console = Console(width=140)
    console.print(facts)
    console.print(table(timings))


def measure(
    label: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, rounds: int, n_tokens: int
) -> list[Timing]:
    """Time every operation for one layer."""
    operations = operations_of(shape, dtype, device, n_tokens)
    times: dict[str, list[float]] = {operation.name: [] for operation in operations}
    for operation in operations:
        operation.call()
    flushed = torch.empty(FLUSHED_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    for _ in range(rounds):
        for operation in operations:
            operation.restore()
            flushed.zero_()
            times[operation.name].append(timed(operation.call, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        Timing(
            operation.name,
            f"{label} {shape[0]}x{shape[1]}",
            str(dtype).removeprefix("torch."),
            medians[operation.name] * 1e6,
            operation.least_bytes,
            operation.least_bytes / medians[operation.name] / 1e9,
            medians[operation.name] / medians[operation.matrix],
        )
        for operation in operations
    ]


def operations_of(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, n_tokens: int) -> list[Operation]:
    """All operations on a weight [out, in] and on tokens [n_tokens, in]."""
    rows, cols = shape
    torch.manual_seed(0)
    dense = torch.randn(shape, device=device).mul_(0.02).to(dtype)
    weight = dense.clone()
    tokens = torch.randn(n_tokens, cols, device=device).to(dtype)
    outputs = torch.randn(n_tokens, rows, device=device).to(dtype)
    stats = ActivationStats.from_tokens(tokens.view(-1, 32, cols))
    weights = torch.rand(3, n_tokens, device=device)
    into = torch.zeros(shape, device=device)
    plain, relative = wanda(weight, stats), ria(weight, stats)
    exact = ScoreTerms(relative.row, relative.col, relative.scale, power=2)
    once, size = weight.numel() * weight.element_size(), weight.element_size()
    reads = tokens.numel() * size
    matrix, batch = "pass over the weight", "pass over the tokens"

    calls: list[tuple[str, Callable[[], object], int, str]] = [
        (matrix, lambda: weight.mul_(1), 2 * once, matrix),
        (batch, lambda: tokens.mul_(1), 2 * reads, batch),
        ("select_nm 2:4, Wanda", lambda: select_nm(weight, plain, 2, 4), 2 * once, matrix),
        ("select_nm 2:4, RIA", lambda: select_nm(weight, relative, 2, 4), 2 * once, matrix),
        ("select_nm 2:4, ACE", lambda: select_nm(weight, exact, 2, 4), 2 * once, matrix),
        ("select_nm 4:8, Wanda", lambda: select_nm(weight, plain, 4, 8), 2 * once, matrix),
        ("select_rows 50 %, Wanda", lambda: select_rows(weight, plain, cols // 2), 2 * once, matrix),
        ("torch.topk + scatter, rows", lambda: by_topk(weight, plain, cols // 2), 2 * once, matrix),
        ("weight_sums", lambda: weight_sums(weight), once, matrix),
        ("all_finite", lambda: all_finite(weight), once, matrix),
        ("moments", lambda: moments(tokens.view(-1, 32, cols)), reads, batch),
        ("weighted_squares, 3 layers", lambda: weighted_squares(tokens, weights), reads, batch),
        ("token_norms", lambda: token_norms(outputs), outputs.numel() * size, batch),
        (
            "coupling",
            lambda: coupling(tokens, outputs, weights[0], "abs", into=into),
            reads + outputs.numel() * size + 8 * into.numel(),
            batch,
        ),
    ]
    return [Operation(*call, restore=lambda: weight.copy_(dense)) for call in calls]


def by_topk(weight: torch.Tensor, terms: ScoreTerms, k: int) -> torch.Tensor:
    """50 % of every row as torch alone does it."""
    assert terms.scale is not None
    scores = weight.abs() * terms.scale
    mask = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, scores.topk(k, dim=1).indices, True)
    return weight.masked_fill_(~mask, 0)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures were measured with."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": str(device)}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device.type != "cuda":
        return {**facts, "note": "a dry run on a CPU: wall times that say nothing of a GPU"}
    facts["gpu"] = torch.cuda.get_device_name(device)
    facts["runtime"] = torch.version.cuda or torch.version.hip
    sparse = torch.backends.cusparselt
    facts["cusparselt"] = sparse.version() if sparse.is_available() else None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        facts["driver"] = None
    return facts


def table(timings: list[Timing]) -> Table:
    """The timings for reading."""
    shown = Table("operation", "layer", "dtype")
    for heading in ("time", "GB/s", "of a pass"):
        shown.add_column(heading, justify="right")
    for timing in timings:
        shown.add_row(
            timing.operation,
            timing.shape,
            timing.dtype,
            f"{timing.microseconds:,.1f} us",
            f"{timing.bandwidth:,.0f}",
            f"{timing.against_pass:.2f}x",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
