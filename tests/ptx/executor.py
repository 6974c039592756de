"""Runs Triton kernels as PTX on the CPU, through the public launchers: what inline PTX does shows only there.

A launch is compiled for a GPU, and its PTX is interpreted with one NumPy array per register, an element per thread of a
program. All threads run in step, so a missing barrier does not show. Only the instructions that the tested kernels
contain are there; another one is an error that names it. A read or write outside a tensor raises :class:`OutOfBounds`.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import torch
import triton

from benchmarks.harness.jit_launches import JitLaunch, caught_launches
from benchmarks.reports.machine_code import gpu_target

from .mma_sp import LANES, mma_sp

SHARED = 1 << 48
"""Address at which shared memory starts; tensors lie below."""

KNOWN = re.compile(
    r"mma\.sp::.*|ldmatrix\..*|ld\.param\.b\d+|(ld|st)\.(global|shared)(\.v[24])?\.b\d+|shfl\.sync\.bfly\.b32|bar\.(warp\.)?sync"
    r"|setp\.(lt|le|gt|ge|eq|ne)\.\w+|selp\.[bf]\d+|cvt(\.rn)?\.\w+\.\w+|mov\.(pred|[bu]\d+)|(add|sub)\.[suf]\d+"
    r"|add\.rn\.f32\.b?f16|fma\.rn\.(f32|f32x2|b?f16x2)|(mul|add)\.f32(x2)?|(prmt|lop3)\.b32|(mul|mad)\.(lo|wide)\.[su]\d+|(shl|shr|and|or|xor|not)\.([bsu]\d+|pred)|(min|max|bfe)\.[su]\d+"
)
"""The instructions that are there, without those that change the place of execution."""

TYPES = {"s": "i", "u": "u", "b": "u", "f": "f"}
TOKEN = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*")

HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}

Operand = str
Values = np.ndarray


class OutOfBounds(AssertionError):
    """A kernel accessed memory outside its tensors."""


@contextmanager
def executed_as_ptx(target: str) -> Iterator[list[str]]:
    """Run the Triton kernels of public launchers on CPU tensors as PTX for ``target``; gives the kernels' names."""
    ran: list[str] = []

    def execute(launch: JitLaunch) -> None:
        ran.append(launch.kernel.__name__)
        _execute(launch, target)

    with caught_launches(execute):
        yield ran


def _execute(launch: JitLaunch, target: str) -> None:
    specialised = launch.specialise(gpu_target(target))
    compiled = triton.compile(specialised.source, target=gpu_target(target), options=specialised.options)
    program = Program(compiled.asm["ptx"])
    memory = Memory(compiled.metadata.shared)
    arguments = [memory.add(one) if torch.is_tensor(one) else one for one in specialised.arguments]
    for place in product(*(range(size) for size in (*launch.grid, 1, 1)[:3])):
        memory.shared[:] = 0xFF
        Block(program, memory, arguments, 32 * compiled.metadata.num_warps, place).run()


class Memory:
    """The tensors of a launch, and the shared memory of a program."""

    def __init__(self, shared: int) -> None:
        self.shared = np.zeros(shared, np.uint8)
        self.areas = [(SHARED, self.shared)]
        self.end = 1 << 20

    def add(self, tensor: torch.Tensor) -> int:
        """The address of a contiguous tensor, aligned as the JIT promises."""
        size = tensor.numel() * tensor.element_size()
        raw = (ctypes.c_uint8 * size).from_address(tensor.data_ptr()) if size else (ctypes.c_uint8 * 0)()
        address = self.end + tensor.data_ptr() % 16
        self.areas.append((address, np.frombuffer(raw, np.uint8)))
        self.end += (size // 4096 + 2) * 4096
        return address

    def at(self, addresses: Values, size: int) -> tuple[np.ndarray, Values]:
        """The bytes of the area that holds all these addresses, and their indices there."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        for start, area in self.areas:
            if start <= low and high <= start + len(area):
                assert not (addresses % size).any(), "an access is not aligned"
                return area, addresses - np.uint64(start)
        raise OutOfBounds(f"an access to the bytes {low} to {high}, which lie in no tensor")


class Program:
    """The instructions of a kernel, and the indices of its labels."""

    def __init__(self, ptx: str) -> None:
        self.instructions: list[tuple[str, str, list[Operand]]] = []
        self.labels: dict[str, int] = {}
        body = ptx[ptx.index("\n{") + 2 : ptx.index("\n}")]
        for line in re.sub(r"//.*", "", body).replace(";", "\n").splitlines():
            text = line.strip().lstrip("{} ")  # braces around inline PTX with registers of its own
            if text.endswith(":"):
                self.labels[text[:-1]] = len(self.instructions)
            elif text and not text.startswith("."):
                found = re.match(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", text)
                assert found is not None
                operands = [operand.strip() for operand in TOKEN.findall(found[3])]
                self.instructions.append((found[1] or "", found[2], operands))


def _dtype(name: str) -> np.dtype:
    """NumPy's dtype for a type of PTX; fp16 and bf16 are kept as bits."""
    if name in HALVES:
        return np.dtype(np.uint16)
    return np.dtype(f"{TYPES[name[0]]}{int(name[1:]) // 8}")


class Block:
    """One program of a launch: its registers, each with a value per thread."""

    def __init__(
        self, program: Program, memory: Memory, arguments: list[int], threads: int, place: tuple[int, ...]
    ) -> None:
        self.program, self.memory, self.arguments, self.threads = program, memory, arguments, threads
        self.registers: dict[str, Values] = {"%tid.x": np.arange(threads, dtype=np.uint64)}
        for axis, index in zip("xyz", place, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full(threads, index, np.uint64)

    def run(self) -> None:
        """Run it to its end."""
        index = 0
        while index < len(self.program.instructions):
            guard, name, operands = self.program.instructions[index]
            active = np.ones(self.threads, bool)
            if guard:
                active = self.predicate(guard)
            kind = name.split(".")[0]
            index += 1
            if kind == "ret":
                return
            if kind == "bra":
                assert active.all() or not active.any(), "threads part"
                if active.all():
                    index = self.program.labels[operands[0]]
            elif active.any():
                self._step(name, operands, active)

    def predicate(self, name: str) -> np.ndarray:
        """A predicate, or its opposite."""
        return ~self.registers[name[1:]] if name.startswith("!") else self.registers[name]

    def read(self, operand: Operand, dtype: np.dtype) -> Values:
        """The values of a register or constant in all threads."""
        if operand in self.registers:
            bits = self.registers[operand]
        elif operand.startswith("0f"):
            bits = np.full(self.threads, int(operand[2:], 16), np.uint64)
        elif operand == "global_smem":
            bits = np.full(self.threads, SHARED, np.uint64)
        else:
            bits = np.full(self.threads, int(operand, 0) & (1 << 64) - 1, np.uint64)
        return bits.astype(f"u{dtype.itemsize}").view(dtype)

    def write(self, register: str, values: Values, active: np.ndarray) -> None:
        """Set a register in the active threads."""
        bits = values
        if values.dtype != bool:
            bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").astype(np.uint64)
        if not active.all():
            bits = np.where(active, bits, self.registers.get(register, np.zeros_like(bits)))
        self.registers[register] = bits

    def _addresses(self, operand: Operand) -> Values:
        found = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        assert found is not None, operand
        start = self.read(found[1], np.dtype(np.uint64))
        if found[1].startswith("%r") and not found[1].startswith("%rd"):
            start = start + np.uint64(SHARED)  # 32 bits of an address in shared memory
        return start + np.int64(found[2] or 0).astype(np.uint64)

    def _step(self, name: str, operands: list[Operand], active: np.ndarray) -> None:
        if not KNOWN.fullmatch(name):
            raise NotImplementedError(f"the executor does not know {name}")
        kind, *_, last = name.split(".")
        if kind == "mma":
            self._mma(name, operands)
        elif kind == "ldmatrix":
            self._load_matrices(name, operands)
        elif kind in ("ld", "st"):
            (self._load if kind == "ld" else self._store)(name, operands, active)
        elif kind == "shfl":
            source = np.arange(self.threads) ^ int(operands[2])
            self.write(operands[0], self.read(operands[1], np.dtype(np.uint32))[source], active)
        elif kind == "setp":
            left, right = (self.read(operand, _dtype(last)) for operand in operands[1:])
            compare = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
            compare |= {"eq": np.equal, "ne": np.not_equal}
            self.write(operands[0], compare[name.split(".")[1]](left, right), active)
        elif kind == "selp":
            left, right = (self.read(operand, _dtype(last)) for operand in operands[1:3])
            self.write(operands[0], np.where(self.predicate(operands[3]), left, right), active)
        elif last == "pred":
            self._logic(kind, operands, active)
        elif kind == "cvt":
            self._convert(name, operands, active)
        elif kind == "mov" and operands[0].startswith("{"):
            self._unpack(operands, _dtype(last), active)
        elif kind == "mov" and operands[1].startswith("{"):
            self._pack(operands, _dtype(last), active)
        elif kind == "prmt":
            self._permute(operands, active)
        elif kind == "lop3":
            self._truth_table(operands, active)
        elif kind == "fma" or last.endswith("x2"):
            self._compute_parts(kind, last, operands, active)
        elif kind != "bar":
            self._compute(name, operands, active)

    def _logic(self, kind: str, operands: list[Operand], active: np.ndarray) -> None:
        values = [
            np.full(self.threads, operand != "0") if operand in ("-1", "0", "1") else self.predicate(operand)
            for operand in operands[1:]
        ]
        work: dict[str, Callable[..., Values]] = {
            "mov": lambda x: x,
            "not": np.logical_not,
            "and": np.logical_and,
            "or": np.logical_or,
        }
        self.write(operands[0], work[kind](*values), active)

    def _compute(self, name: str, operands: list[Operand], active: np.ndarray) -> None:
        kind, *modifiers, last = name.split(".")
        dtype = _dtype(last)
        work: dict[str, Callable[..., Any]] = {
            "mov": lambda x: x,
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "mad": lambda x, y, z: x * y + z,
            "shl": np.left_shift,
            "shr": np.right_shift,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "not": np.invert,
            "min": np.minimum,
            "max": np.maximum,
            "bfe": _bit_field,
        }
        if last in HALVES:  # the first summand has 16 bits
            values = [_widened(self.read(operands[1], dtype), last), self.read(operands[2], np.dtype(np.float32))]
            self.write(operands[0], values[0] + values[1], active)
            return
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}") if "wide" in modifiers else dtype
        shift = kind in ("shl", "shr", "bfe")
        types = [dtype if shift and k == 0 else np.dtype(np.uint32) if shift else dtype for k in range(3)]
        if kind == "mad":
            types[2] = wide
        values = [self.read(operand, types[k]) for k, operand in enumerate(operands[1:])]
        if kind in ("mul", "mad"):
            values[:2] = (value.astype(wide) for value in values[:2])
        elif shift and kind != "bfe":
            values[1] = values[1].astype(dtype)
        with np.errstate(over="ignore"):
            self.write(operands[0], work[kind](*values), active)

    def _convert(self, name: str, operands: list[Operand], active: np.ndarray) -> None:
        *_, target, source = name.split(".")
        values = self.read(operands[1], _dtype(source))
        if source in HALVES:
            values = _widened(values, source)
        if target in HALVES:
            rounded = torch.from_numpy(values.astype(np.float32)).to(HALVES[target])
            self.write(operands[0], rounded.view(torch.int16).numpy(), active)
        else:
            self.write(operands[0], values.astype(_dtype(target)), active)

    def _unpack(self, operands: list[Operand], dtype: np.dtype, active: np.ndarray) -> None:
        parts = _members(operands[0])
        bits = self.read(operands[1], dtype).astype(np.uint64)
        width = 8 * dtype.itemsize // len(parts)
        for k, part in enumerate(parts):
            self.write(part, bits >> np.uint64(width * k) & np.uint64((1 << width) - 1), active)

    def _permute(self, operands: list[Operand], active: np.ndarray) -> None:
        """Four bytes of two words, each chosen by four bits of a third one."""
        low, high, chosen = (self.read(operand, np.dtype(np.uint32)).astype(np.uint64) for operand in operands[1:])
        assert not (chosen & np.uint64(0x8888)).any(), "signs are replicated"
        both, word = low | high << np.uint64(32), np.zeros(self.threads, np.uint64)
        for k in range(4):
            place = chosen >> np.uint64(4 * k) & np.uint64(7)
            word |= (both >> np.uint64(8) * place & np.uint64(0xFF)) << np.uint64(8 * k)
        self.write(operands[0], word.astype(np.uint32), active)

    def _truth_table(self, operands: list[Operand], active: np.ndarray) -> None:
        """A function of three bits, for each bit of three words: bit 4 x + 2 y + z of a table."""
        x, y, z = (self.read(operand, np.dtype(np.uint32)) for operand in operands[1:4])
        word = np.zeros(self.threads, np.uint32)
        for k in (k for k in range(8) if int(operands[4], 0) >> k & 1):
            word |= (x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z)
        self.write(operands[0], word, active)

    def _compute_parts(self, kind: str, name: str, operands: list[Operand], active: np.ndarray) -> None:
        """A sum, a product or x y + z, computed in fp64 and rounded: of the number in a register, or of its two."""
        dtype = HALVES.get(name.removesuffix("x2"), torch.float32)
        register = np.dtype(np.int64 if name == "f32x2" else np.int32)
        values = [torch.from_numpy(self.read(one, register).copy()).view(dtype).double() for one in operands[1:]]
        result = values[0] + values[1] if kind == "add" else values[0] * values[1]
        if kind == "fma":
            result += values[2]
        self.write(operands[0], result.to(dtype).view(torch.int32).numpy().view(register), active)

    def _pack(self, operands: list[Operand], dtype: np.dtype, active: np.ndarray) -> None:
        parts = _members(operands[1])
        part = np.dtype(f"u{dtype.itemsize // len(parts)}")
        values = np.stack([self.read(one, part) for one in parts], 1)
        self.write(operands[0], values.view(dtype)[:, 0], active)

    def _load(self, name: str, operands: list[Operand], active: np.ndarray) -> None:
        dtype = _dtype(name.split(".")[-1])
        if ".param" in name:
            argument = self.arguments[int(operands[1].strip("[]").rsplit("_", 1)[1])]
            self.write(operands[0], np.full(self.threads, argument & (1 << 64) - 1, np.uint64), active)
            return
        targets = _members(operands[0])
        size = dtype.itemsize * len(targets)
        area, places = self.memory.at(self._addresses(operands[1])[active], size)
        loaded = area[places[:, None] + np.arange(size, dtype=np.uint64)].view(dtype)
        for k, target in enumerate(targets):
            values = np.zeros(self.threads, dtype)
            values[active] = loaded[:, k]
            self.write(target, values, active)

    def _store(self, name: str, operands: list[Operand], active: np.ndarray) -> None:
        dtype = _dtype(name.split(".")[-1])
        sources = _members(operands[1])
        area, places = self.memory.at(self._addresses(operands[0])[active], dtype.itemsize * len(sources))
        for k, source in enumerate(sources):
            values = np.ascontiguousarray(self.read(source, dtype)[active]).view(np.uint8).reshape(-1, dtype.itemsize)
            area[places[:, None] + np.arange(k * dtype.itemsize, (k + 1) * dtype.itemsize, dtype=np.uint64)] = values

    def _load_matrices(self, name: str, operands: list[Operand]) -> None:
        """Matrices of 8 rows of 16 bytes; lane 8 k + i gives the address of row i of matrix k, lane l gets a word."""
        assert re.match(r"ldmatrix\.sync\.aligned\.m8n8\.x\d\.shared\.b16$", name), name
        lane, warp = np.arange(self.threads) % LANES, np.arange(self.threads) // LANES * LANES
        for k, target in enumerate(_members(operands[0])):
            rows = self._addresses(operands[1])[warp + 8 * k + lane // 4]
            area, places = self.memory.at(rows + (4 * (lane % 4)).astype(np.uint64), 4)
            words = area[places[:, None] + np.arange(4, dtype=np.uint64)].view(np.uint32)
            self.write(target, words[:, 0], np.ones(self.threads, bool))

    def _mma(self, name: str, operands: list[Operand]) -> None:
        assert name.startswith("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."), name
        dtype = torch.bfloat16 if ".bf16.bf16.f32" in name else torch.float16
        result, *fragments = (_members(operand) for operand in operands[:4])
        a, b = (np.stack([self.read(one, np.dtype(np.uint32)) for one in some]) for some in fragments[:2])
        c = np.stack([self.read(one, np.dtype(np.float32)) for one in fragments[2]])
        places, selector = self.read(operands[4], np.dtype(np.uint32)), int(operands[5], 0)
        warps = [
            mma_sp(a[:, warp], b[:, warp], c[:, warp], places[warp], selector, dtype)
            for warp in (slice(first, first + LANES) for first in range(0, self.threads, LANES))
        ]
        for register, values in zip(result, np.concatenate(warps, 1), strict=True):
            self.write(register, np.ascontiguousarray(values), np.ones(self.threads, bool))


def _members(operand: Operand) -> list[str]:
    """The registers of a vector, or the only one."""
    return [part.strip() for part in operand.strip("{}").split(",")]


def _widened(bits: Values, name: str) -> Values:
    """The numbers of 16 bits as fp32."""
    return torch.from_numpy(bits.view(np.int16)).view(HALVES[name]).float().numpy()


def _bit_field(values: Values, first: Values, size: Values) -> Values:
    shifted = values >> first.astype(values.dtype)
    width = int(size[0])
    if values.dtype.kind == "u":
        return shifted & values.dtype.type((1 << width) - 1)
    unused = values.dtype.type(8 * values.dtype.itemsize - width)
    return shifted << unused >> unused
