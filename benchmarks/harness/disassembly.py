"""Reads a kernel's machine code: registers, spills, access widths, and instructions by pipe."""

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Most warps and blocks of an SM, and its shared memory in KiB (CUDA programming guide).
RESIDENT = {
    75: (32, 16, 64),
    80: (64, 32, 164),
    86: (48, 16, 100),
    89: (48, 24, 100),
    90: (64, 32, 228),
    100: (64, 32, 228),
    120: (48, 24, 100),
}

PIPES = {
    "control": r"BRA|EXIT|BAR|NOP|RET|CALL|BSSY|BSYNC|BREAK|WARPSYNC|DEPBAR|LDGDEPBAR|ERRBAR|MEMBAR|CCTL|YIELD|BPT",
    "memory": r"LDG|STG|LDS|STS|LDL|STL|ATOM|ATOMG|ATOMS|RED|REDG|SHFL|LDSM|STSM|LDGSTS|LD|ST",
    "tensor": r"HMMA|IMMA|QMMA|HGMMA|WARPGROUP|UTC\w*",
    "uniform": r"U[A-Z0-9]+|S2UR|R2UR|LDCU|LDC|S2R|CS2R|S2P|VOTEU",
    "fp32": r"FADD|FMUL|FFMA|HADD2|HFMA2|HMUL2|FADD2|FMUL2|FFMA2|HADD2_32I|HFMA2_MMA",
    "imad": r"IMAD|IDP",
    "special": r"MUFU|F2F|F2I|I2F|I2FP|POPC|FLO|BREV|REDUX|CREDUX",
}
PIPE_PATTERNS = {name: re.compile(rf"(?:{ops})\b") for name, ops in PIPES.items()}


@dataclass(frozen=True)
class MachineCode:
    """One kernel for one target.

    Attributes:
        registers: registers per thread.
        spills: accesses to local memory (NVIDIA), or words of scratch per thread (AMD).
        shared: bytes of shared memory per program.
        occupancy: resident warps over the maximum of an SM; NaN on AMD.
        loads, stores: global accesses by bits, in the main loop if there is one.
        loop: instructions of one pass of the main loop by pipe; empty without a loop.
        rest: all other instructions by pipe.
        threads: threads per program.
    """

    registers: int
    spills: int
    shared: int
    occupancy: float
    loads: Counter[int]
    stores: Counter[int]
    loop: Counter[str]
    rest: Counter[str]
    threads: int


def read(compiled: Any) -> MachineCode:
    """Disassemble what ``triton.compile`` returned."""
    return _read_cubin(compiled) if "cubin" in compiled.asm else _read_amdgcn(compiled)


def _read_cubin(compiled: Any) -> MachineCode:
    arch = compiled.metadata.target.arch
    warps = compiled.metadata.num_warps
    listing, usage = _disassembled(compiled.asm["cubin"])
    instructions, labels = _parse(listing)
    start, stop = _main_loop(instructions, labels)
    body, rest = instructions[start:stop], instructions[:start] + instructions[stop:]
    accessed = body or instructions
    registers = int(usage["REG"])
    return MachineCode(
        registers=registers,
        spills=sum(bool(re.match(r"LDL|STL", op)) for op in instructions),
        shared=compiled.metadata.shared,
        occupancy=_occupancy(arch, registers, compiled.metadata.shared, warps),
        loads=_widths(accessed, r"LDG\b|LDGSTS"),
        stores=_widths(accessed, r"STG\b"),
        loop=Counter(_pipe(op) for op in body),
        rest=Counter(_pipe(op) for op in rest),
        threads=warps * 32,
    )


@functools.lru_cache(maxsize=16)
def _disassembled(cubin: bytes) -> tuple[str, dict[str, str]]:
    """The listing, without the analysis of branches that only GPUs before Volta need, and the resources by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _output("nvdisasm", "--no-dataflow", "-c", file.name)
        return listing, dict(re.findall(r"(\w+):(\d+)", _output("cuobjdump", "--dump-resource-usage", file.name)))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _parse(listing: str) -> tuple[list[str], dict[str, int]]:
    """Instructions without guards up to the last EXIT, and the positions of labels."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            instructions.append(instruction.group(1).strip())
    end = max(k for k, text in enumerate(instructions) if text.startswith("EXIT")) + 1
    return instructions[:end], labels


def _main_loop(instructions: list[str], labels: dict[str, int]) -> tuple[int, int]:
    """Bounds of the innermost loop with the most loads from global memory; (0, 0) without a loop."""
    bounds = []
    for k, text in enumerate(instructions):
        branch = re.match(r"BRA.*`\((\.L_\w+)\)", text)
        if branch and labels.get(branch.group(1), k + 1) <= k:
            bounds.append((labels[branch.group(1)], k + 1))
    innermost = [a for a in bounds if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in bounds)]
    loading = {a: len(_accesses(instructions[slice(*a)], r"LDG")) for a in innermost}
    best = max(loading, key=lambda a: loading[a], default=(0, 0))
    return best if loading.get(best) else (0, 0)


def _accesses(instructions: list[str], pattern: str) -> list[str]:
    return [text.split()[0] for text in instructions if re.match(pattern, text)]


def _widths(instructions: list[str], pattern: str) -> Counter[int]:
    widths: Counter[int] = Counter()
    for op in _accesses(instructions, pattern):
        bits = re.search(r"\.(?:ENL2\.)?[USF]?(256|128|64|16|8)\b", op)
        widths[int(bits.group(1)) if bits else 32] += 1
    return widths


def _pipe(instruction: str) -> str:
    return next((name for name, pattern in PIPE_PATTERNS.items() if pattern.match(instruction)), "alu")


def _occupancy(arch: int, registers: int, shared: int, warps: int) -> float:
    most_warps, most_blocks, kibibytes = RESIDENT[arch]
    by_registers = 65536 // (math.ceil(registers * 32 / 256) * 256) // warps
    by_shared = kibibytes * 1024 // (shared + 1024)
    return min(most_warps // warps, most_blocks, by_registers, by_shared) * warps / most_warps


def _read_amdgcn(compiled: Any) -> MachineCode:
    listing = compiled.asm["amdgcn"]

    def noted(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", listing)
        return int(found.group(1)) if found else 0

    words = {"ubyte": 8, "sbyte": 8, "byte": 8, "u8": 8, "ushort": 16, "short": 16, "u16": 16, "b16": 16}
    widths: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for kind, width in re.findall(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)", listing, re.M):
        size = re.search(r"dwordx(\d)|b(\d+)$", width)
        short = next((bits for name, bits in words.items() if width.startswith(name)), 32)
        widths[kind][(int(size.group(1)) * 32 if size.group(1) else int(size.group(2))) if size else short] += 1
    vector = re.findall(r"^\s+((?:v|s|global|buffer|flat|ds|scratch)_\w+)", listing, re.M)
    return MachineCode(
        registers=noted("vgpr_count"),
        spills=noted("private_segment_fixed_size") // 4,
        shared=noted("group_segment_fixed_size"),
        occupancy=math.nan,
        loads=widths["load"],
        stores=widths["store"],
        loop=Counter(),
        rest=Counter("all" for _ in vector),
        threads=compiled.metadata.num_warps * compiled.metadata.warp_size,
    )
