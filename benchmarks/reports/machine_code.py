"""Compiles every kernel for every target, without a GPU, and reports its machine code in docs/kernels.md.

Machine code is kept in docs/kernels.json (:mod:`benchmarks.harness.code_record`). A run compiles only what changed, and
one that was stopped resumes.

python -m benchmarks.reports.machine_code [--target sm_103 ...] [--output docs/kernels.md]
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from ..harness.block_cases import block_cases
from ..harness.code_record import CodeRecord
from ..harness.disassembly import MachineCode, read
from ..harness.jit_launches import JitLaunch, launches_on
from ..harness.kernel_cases import TOKENS, Case, cosp_select_case, coupling_case, every_case

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100")


@dataclass(frozen=True)
class Gpu:
    """Data-sheet values: target, number of multiprocessors, boost clock in GHz, DRAM bandwidth in TB/s."""

    target: str
    multiprocessors: int
    gigahertz: float
    terabytes: float


GPUS = {
    "A100": Gpu("sm_80", 108, 1.41, 2.039),
    "H100": Gpu("sm_90", 132, 1.755, 3.35),
    "H200": Gpu("sm_90", 132, 1.755, 4.8),
    "B200": Gpu("sm_100", 148, 1.85, 8.0),
    "L40S": Gpu("sm_89", 142, 2.52, 0.864),
    "RTX 4090": Gpu("sm_89", 128, 2.52, 1.008),
    "RTX 5090": Gpu("sm_120", 170, 2.41, 1.792),
}

# Lanes that a multiprocessor processes per clock (CUDA programming guide); it issues 128 in total.
LANES = {"fp32": 128, "alu": 64, "imad": 64, "special": 16, "memory": 32}
ISSUED = 128

PREAMBLE = """# What the kernels compile to

Written by `make kernels-report`, which compiles every Triton body for every target, with the arguments,
alignment and block sizes that its public launcher chooses, and disassembles it. No GPU is involved, so
**the times below are estimates from machine code, not measurements**.

- Shapes: a weight of 4096 x 11008 (rows of the stated length for select_rows), 16384 tokens of 4096.
- Instructions per element: all instructions of a program over its elements. Loops count by their trips, and
  branches with both sides. (In select_rows this counts the steps that resolve ties, which most rows skip.)
- Compute over memory: the time of the busiest pipe at boost clock (per multiprocessor and clock 128 lanes
  issued; 64 for integer and logic, 128 for fp32, 64 on A100, 16 for conversions and bit counts, 32 for
  memory), over the time for the bytes that must cross DRAM, at data-sheet bandwidth. Below 1, the kernel is
  bound by memory. Latency, launches and caches are not included.
- A packed product beside a dense one that only waits for its bytes: take the larger of 1 and the ratio, times the share
  of the dense bytes that the packed weight has (0.56 for 2:4 in bf16, 0.32 for 8 bits, 0.20 for 4 bits). Above 1, the
  estimate says that the packed product takes longer, in spite of its fewer bytes.
- Targets: sm_80 is the A100, sm_86 the GeForce RTX 30 series and the A10, sm_89 the RTX 40 series and the L40S, sm_90
  the H100 and H200, sm_100 the B200, sm_120 the RTX 50 series; gfx90a is AMD's MI200 series, gfx942 the MI300 series,
  gfx1100 the Radeon RX 7900.
- nm_linear_mma is inline PTX for NVIDIA GPUs. It never ran on a GPU and is used only on request; tests/ptx runs its
  PTX through a model of the instruction.
- If an operation has several launches, the first one is shown. coupling and cosp_select are bound by matrix
  products and have no such ratio; 12 passes of select_rows over a layer are not shown.
"""

ONE_PASS = """
## The published CosP in one pass

cosp_select (RIA's base, 2:4) compared with coupling followed by select_nm, for a square layer of {width} in {dtype}.
Estimated: the busiest pipe's time for the products, which differ only in the epilogue, and for the two steps also the
DRAM time for clearing the matrix and for select_nm. The time of the matrix units is the same on both sides and is not
included. A share below 1 means that one pass is faster. The fewer the tokens, the larger is the share of the matrix,
which one pass never stores. One pass needs all tokens in one call; streamed statistics use coupling.
"""


Codes = dict[str, tuple[JitLaunch, MachineCode]]
"""The launch of a case and its machine code, by target."""


def gpu_target(name: str) -> GPUTarget:
    """``sm_90`` or ``gfx942`` as Triton's target."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 32 if re.match(r"gfx1\d{3}$", name) else 64)


def compiled(launch: JitLaunch, target: GPUTarget) -> MachineCode:
    """Compile a launch and read its machine code."""
    specialised = launch.specialise(target)
    return read(triton.compile(specialised.source, target=target, options=specialised.options))


def kernel_of(case: Case, target_name: str) -> tuple[JitLaunch, MachineCode]:
    """The launch that a case shows, usually the first, and its machine code."""
    target = gpu_target(target_name)
    launch = launches_on(target, case.call)[case.launch]
    return launch, compiled(launch, target)


def per_element(case: Case, launch: JitLaunch, code: MachineCode) -> Counter[str]:
    """Instructions per element by pipe, in lanes."""
    programs = math.prod(launch.grid)
    counts = Counter({pipe: n * code.threads * programs / case.elements for pipe, n in code.rest.items()})
    if code.loop:
        widest = max(code.loads)
        elements = widest / 8 * code.loads[widest] * code.threads / case.loaded
        counts.update({pipe: n * code.threads / elements for pipe, n in code.loop.items()})
    return counts


def compute_over_memory(case: Case, counts: Counter[str], gpu: Gpu) -> float:
    """Time of the busiest pipe over the time of the bytes; below 1, the kernel is bound by memory."""
    return busiest_pipe(counts, gpu) / (case.moved / (gpu.terabytes * 1e12))


def busiest_pipe(counts: Counter[str], gpu: Gpu) -> float:
    """Seconds of the busiest pipe of all multiprocessors for ``counts`` lanes."""
    lanes = LANES | ({"fp32": 64} if gpu.target == "sm_80" else {})
    clocks = max(counts.total() / ISSUED, *(counts[pipe] / width for pipe, width in lanes.items()))
    return clocks / (gpu.multiprocessors * gpu.gigahertz * 1e9)


def over_tokens(launch: JitLaunch, code: MachineCode, n_tokens: int) -> Counter[str]:
    """Instructions of a whole GEMM over tokens by pipe, in lanes."""
    trips = -(-n_tokens // launch.keywords["BLOCK_TOKENS"])
    threads = launch.grid[0] * code.threads
    counts = Counter({pipe: n * threads for pipe, n in code.rest.items()})
    counts.update({pipe: n * threads * trips for pipe, n in code.loop.items()})
    return counts


def recorded(case: Case, target_name: str, record: CodeRecord) -> tuple[JitLaunch, MachineCode]:
    """As :func:`kernel_of`, compiled only if the record does not hold the machine code.

    The launch is without its arguments: the tensors of all cases and targets do not fit in memory together.
    """
    target = gpu_target(target_name)
    launch = launches_on(target, case.call)[case.launch]
    code = record.code(f"{case.name}, {_name(case.dtype)}, {target_name}", launch, target)
    return replace(launch, arguments=()), code


def one_pass_lines(record: CodeRecord, dtype: torch.dtype = torch.bfloat16) -> Iterator[str]:
    """cosp_select compared with coupling and select_nm."""
    width = TOKENS[2]
    stored, pruned = coupling_case(dtype, "abs"), cosp_select_case(dtype, "abs", "RIA")
    yield ONE_PASS.format(width=width, dtype=_name(dtype))
    yield _row("tokens", "", *GPUS)
    yield _row(*["---"] * (2 + len(GPUS)))
    for n_tokens in (2048, 16384):
        steps, one, shares = [], [], []
        for gpu in GPUS.values():
            two = busiest_pipe(over_tokens(*recorded(stored, gpu.target, record), n_tokens), gpu)
            two += (2 * dtype.itemsize + 8) * width**2 / (gpu.terabytes * 1e12)
            steps.append(two)
            one.append(busiest_pipe(over_tokens(*recorded(pruned, gpu.target, record), n_tokens), gpu))
            shares.append(one[-1] / two)
        yield _row(n_tokens, "coupling, then select_nm, µs", *(f"{seconds * 1e6:.0f}" for seconds in steps))
        yield _row("", "cosp_select, µs", *(f"{seconds * 1e6:.0f}" for seconds in one))
        yield _row("", "share", *(f"{share:.2f}" for share in shares))


def report(targets: tuple[str, ...], record: CodeRecord) -> Iterator[str]:
    """Lines of docs/kernels.md. The record is written after every case, so that a stopped run loses one at most."""
    yield PREAMBLE
    cases = [*every_case(), *block_cases()]
    codes: dict[tuple[str, torch.dtype], Codes] = {}
    for case in cases:
        there = (target for target in targets if not case.nvidia or target.startswith("sm_"))
        codes[case.name, case.dtype] = {target: recorded(case, target, record) for target in there}
        record.write()
    yield "## Registers of a thread\n\nSpilled accesses, if any, in brackets; vector registers on AMD.\n"
    yield _row("kernel", "dtype", *targets)
    yield _row(*["---"] * (2 + len(targets)))
    for case in cases:
        yield registers_row(case, codes[case.name, case.dtype], targets)
    yield "\n## Instructions and time, for sm_90 unless a column names another GPU\n"
    yield _row("kernel", "dtype", "shared bytes", "occupancy", "loads", "stores", "instructions", *GPUS)
    yield _row(*["---"] * (7 + len(GPUS)))
    for case in cases:
        yield time_row(case, codes[case.name, case.dtype])
    yield from one_pass_lines(record)


def registers_row(case: Case, codes: Codes, targets: tuple[str, ...]) -> str:
    """A kernel's registers and spills on every target that it runs on."""
    return _row(case.name, _name(case.dtype), *(_registers(codes[t][1]) if t in codes else "" for t in targets))


def time_row(case: Case, codes: Codes) -> str:
    """A kernel's accesses and instructions on sm_90, and its compute over memory on every GPU."""
    launch, code = codes["sm_90"]
    instructions, ratios = "", [""] * len(GPUS)
    if case.moved:
        instructions = f"{per_element(case, launch, code).total():.1f}"
        on_gpu = ((per_element(case, *codes[gpu.target]), gpu) for gpu in GPUS.values())
        ratios = [f"{compute_over_memory(case, counts, gpu):.2f}" for counts, gpu in on_gpu]
    accesses = _widths(code.loads), _widths(code.stores)
    return _row(case.name, _name(case.dtype), code.shared, f"{code.occupancy:.0%}", *accesses, instructions, *ratios)


def _registers(code: MachineCode) -> str:
    return f"{code.registers}{f' ({code.spills})' * (code.spills > 0)}"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _widths(accesses: Counter[int]) -> str:
    return ", ".join(f"{count} x {bits} bit" for bits, count in sorted(accesses.items(), reverse=True))


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target", action="append", default=[], help="additional target, as sm_103 or gfx950; repeatable"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/kernels.md"))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(exist_ok=True)
    record = CodeRecord(arguments.output.with_suffix(".json"))
    lines = list(report((*TARGETS, *arguments.target), record))
    record.forget_others()
    record.write()
    arguments.output.write_text("\n".join(lines) + "\n")
    print(f"wrote {arguments.output}: {record.compiled} kernels compiled, {record.reused} unchanged")


if __name__ == "__main__":
    main()
