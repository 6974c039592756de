"""nm_linear on sparse matrix units beside the default product, on this GPU: first whether it is right, then its time.

python -m benchmarks.reports.sparse_units [--dry-run]

The kernel for sparse matrix units never ran before the first run of this report. Fails if an output is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import torch
import typer

from ace_triton.kernels.few_bits import LARGEST
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.nm_linear_mma import fragments_of, nm_linear_mma
from ace_triton.kernels.pack_nm import PackedNM, pack_nm
from ace_triton.kernels.quantize_nm import dequantize_nm, quantize_nm
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.unpack_nm import unpack_nm

from ..harness.timer import Stopwatch

SHAPES = ((1024, 4096), (4096, 4096), (4096, 11008))
CHECKED = (
    ((16, 64), torch.float16, None),
    ((37, 384), torch.bfloat16, 8),
    ((37, 384), torch.float16, 4),
    ((37, 192), torch.bfloat16, None),
    ((4096, 1088), torch.bfloat16, None),
    ((4096, 1152), torch.float16, 8),
    ((4096, 11008), torch.bfloat16, 4),
)
GROUP = 128
ROWS = (1, 8, 16, 64)
ROUNDS = 10
CACHE_BYTES = 2**28

Call = Callable[[], object]


def packed_weight(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, bits: int | None = None
) -> PackedNM:
    """A random 2:4 weight of small integers, so that products and sums are exact; for few bits, a step weighs 1."""
    weight = torch.randint(-3, 4, shape, device=device).to(dtype)
    packed = pack_nm(select_nm(weight, ScoreTerms(), 2, 4), 2, 4)
    if bits is None:
        return packed
    packed.values[:, :: GROUP // 2] = LARGEST[bits]
    return quantize_nm(packed, bits, GROUP)


def wrong_outputs(packed: PackedNM, n_tokens: int) -> int:
    """The number of outputs that differ from the dense product, which rounds the same exact sums."""
    tokens = torch.randint(-3, 4, (n_tokens, packed.shape[1]), device=packed.values.device).to(packed.dtype)
    bias = torch.randint(-3, 4, (packed.shape[0],), device=packed.values.device).to(packed.dtype)
    exact = packed if packed.absmax is None else dequantize_nm(packed, torch.float32)
    expected = tokens.double() @ unpack_nm(exact).double().t() + bias.double()
    outputs = nm_linear_mma(tokens, packed, fragments_of(packed), bias)
    return int((outputs != expected.to(packed.dtype)).sum())


def copies_of(packed: PackedNM) -> list[PackedNM]:
    """Copies that together exceed a GPU's cache, so that no call finds its weight there; one copy on a CPU."""
    count = 1 if packed.values.device.type == "cpu" else min(32, 1 + CACHE_BYTES // packed.packed_bytes)
    return [packed.with_tensors({name: t.clone() for name, t in packed.tensors.items()}) for _ in range(count)]


def microseconds(calls: Sequence[Call], stopwatch: Stopwatch, device: torch.device) -> float:
    """Time of a call, from the fastest of ROUNDS replays of a CUDA graph of all calls: launches take no time there."""
    for call in calls:
        call()
    run: Call = calls[0]
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        run = graph.replay
    return min(stopwatch.time(run) for _ in range(ROUNDS)) * 1e6 / len(calls)


def print_times(shape: tuple[int, int], rows: Sequence[int], device: torch.device, bits: int | None) -> None:
    """A line for each number of rows."""
    stopwatch = Stopwatch(device)
    weights = copies_of(packed_weight(shape, torch.bfloat16, device, bits))
    repacked = [fragments_of(packed) for packed in weights]
    for n_tokens in rows:
        tokens = torch.randn(n_tokens, shape[1], device=device).bfloat16()
        default: list[Call] = [partial(nm_linear, tokens, packed) for packed in weights]
        other: list[Call] = [
            partial(nm_linear_mma, tokens, packed, fragments)
            for packed, fragments in zip(weights, repacked, strict=True)
        ]
        times = (microseconds(calls, stopwatch, device) for calls in (default, other))
        print(" x ".join(map(str, shape)), bits or 16, n_tokens, *(f"{one:.1f}" for one in times), sep="\t", flush=True)


def main(dry_run: Annotated[bool, typer.Option("--dry-run", help="On a CPU, with small inputs.")] = False) -> None:
    """Print a line for each checked weight, then one for each shape and number of rows."""
    device = torch.device("cpu" if dry_run else "cuda")
    torch.manual_seed(0)
    wrong = 0
    print("shape", "dtype", "bits", "wrong outputs of 1, 9 and 64 rows", sep="\t")
    for shape, dtype, bits in CHECKED[: 3 if dry_run else None]:
        packed = packed_weight(shape, dtype, device, bits)
        found = [wrong_outputs(packed, n_tokens) for n_tokens in (1, 9, 64)]
        print(" x ".join(map(str, shape)), dtype, bits or 16, *found, sep="\t", flush=True)
        wrong += sum(found)
    if wrong:
        print(f"{wrong} outputs are wrong; no times")
        raise typer.Exit(1)
    print("shape, bf16", "bits", "rows", "nm_linear, us", "nm_linear_mma, us", sep="\t")
    shapes = ((64, 128),) if dry_run else SHAPES
    for shape, bits in (*((shape, None) for shape in shapes), (shapes[-1], 8), (shapes[-1], 4)):
        print_times(shape, (1,) if dry_run else ROWS, device, bits)


if __name__ == "__main__":
    typer.run(main)
