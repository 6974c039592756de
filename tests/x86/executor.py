"""Runs Triton kernels as x86 machine code, through the public launchers and without a GPU.

Triton's own AMD pipeline lowers a launch for one warp of one lane, so a program becomes plain scalar LLVM IR. All that
is specific to GPUs is removed from the IR, and llvmlite compiles it for this machine. Arithmetic, rounding and
addresses are those of the kernel (also for bf16, which the interpreter gets wrong). Sums over a warp become sums in one
lane. Kernels that need shared memory even with one lane cannot run.

Every launch runs in a child process, on copies of its tensors between unmapped pages. A read or write outside a tensor
ends the child, and the launch raises :class:`OutOfBounds`. So do memory blocks whose addresses a table holds.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any, ClassVar
from unittest import mock

import llvmlite.binding as llvm
import torch
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import make_backend

from ace_triton.kernels import memory
from benchmarks.harness.jit_launches import JitLaunch, Specialised, caught_launches

TARGET = GPUTarget("hip", "gfx1010", 1)  # no matrix units: tl.dot becomes plain multiply-adds
SCALARS = {"i1": ctypes.c_int8, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
QUICK_COMPILE = {"DISABLE_LLVM_OPT": "1"}  # compiles much faster; the code that runs is the same
UNUSED = 0xFF  # a NaN in every floating dtype
PAGE = mmap.PAGESIZE
NO_ACCESS = 0

BEHIND: dict[int, torch.Tensor] = {}
"""Tensors whose addresses launchers have taken for tables, by address; they stay alive until the context ends."""

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
libc = ctypes.CDLL(None, use_errno=True)


class OutOfBounds(AssertionError):
    """A kernel accessed memory outside its tensors."""


@contextmanager
def executed_on_x86(lanes: int = 2) -> Iterator[None]:
    """Run the Triton kernels of public launchers on CPU tensors; torch.empty is filled with NaN or the largest integer.

    Args:
        lanes: lanes per warp that the launchers assume. More lanes mean larger blocks, and the compile time of one
            lane's scalar code grows faster than they do; 32 gives the blocks of a GPU.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    noted = mock.patch.object(memory, "device_address", _noted_address)
    try:
        with caught_launches(execute, lanes), noted, knobs.amd.scope(), mock.patch.dict(os.environ, QUICK_COMPILE):
            knobs.amd.use_buffer_ops = False
            yield
    finally:
        BEHIND.clear()
        torch.use_deterministic_algorithms(deterministic)


def _noted_address(tensor: torch.Tensor) -> int:
    if tensor.numel():
        BEHIND[tensor.data_ptr()] = tensor
    return tensor.data_ptr()


def execute(launch: JitLaunch) -> None:
    """Run all programs of a launch in sequence."""
    specialised = launch.specialise(TARGET)
    program = Program.of(specialised)
    with ExitStack() as stack:
        blocks: dict[int, GuardedCopy] = {}
        given = [_with_copies(a, blocks, stack) if torch.is_tensor(a) else a for a in specialised.arguments]
        guarded = [stack.enter_context(GuardedCopy(a)) if torch.is_tensor(a) else a for a in given]
        arguments = [a.address if isinstance(a, GuardedCopy) else a for a in guarded]
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            program.run(launch.grid, arguments)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            raise OutOfBounds(f"{launch.kernel.__name__}{list(launch.grid)} died of signal {os.WTERMSIG(status)}")
        for copy in (*guarded, *blocks.values()):
            if isinstance(copy, GuardedCopy):
                copy.give_back(launch.kernel.__name__)


def _with_copies(argument: torch.Tensor, blocks: dict[int, GuardedCopy], stack: ExitStack) -> torch.Tensor:
    """The argument, or a table with the addresses of guarded copies of the blocks of memory behind its addresses."""
    if argument.dtype != torch.int64 or not BEHIND.keys() & set(argument.flatten().tolist()):
        return argument
    table = argument.clone()
    for place, number in enumerate(argument.flatten().tolist()):
        if number in BEHIND:
            storage = BEHIND[number].untyped_storage()
            start = storage.data_ptr()
            if start not in blocks:
                block = torch.empty(0, dtype=torch.uint8).set_(storage)
                blocks[start] = stack.enter_context(GuardedCopy(block))
            table.view(-1)[place] = blocks[start].address + number - start
    return table


class GuardedCopy:
    """A copy of a tensor's bytes between two unmapped pages; it ends as close to the second as alignment allows."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        self.size = span * tensor.element_size() if tensor.numel() else 0
        pages = self.size // PAGE + 2
        self.memory = mmap.mmap(-1, (pages + 2) * PAGE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        end = self.base + (pages + 1) * PAGE
        self.address = end - self.size - (end - self.size - tensor.data_ptr()) % 16
        self.margins = [(self.base + PAGE, self.address), (self.address + self.size, end)]
        self.guards = [self.base, end]

    def __enter__(self) -> GuardedCopy:
        ctypes.memmove(self.address, self.tensor.data_ptr(), self.size)
        for start, stop in self.margins:
            ctypes.memset(start, UNUSED, stop - start)
        self._protect(NO_ACCESS)
        return self

    def __exit__(self, *_: object) -> None:
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)

    def _protect(self, access: int) -> None:
        for guard in self.guards:
            if libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), access):
                raise OSError(ctypes.get_errno(), "mprotect")

    def give_back(self, kernel: str) -> None:
        """Copy the kernel's results into the tensor; raise OutOfBounds if the kernel wrote outside of it."""
        for start, stop in self.margins:
            if ctypes.string_at(start, stop - start).strip(bytes([UNUSED])):
                raise OutOfBounds(f"{kernel} wrote beside a tensor of shape {tuple(self.tensor.shape)}")
        ctypes.memmove(self.tensor.data_ptr(), self.address, self.size)


class Program:
    """One specialized kernel as a native function."""

    compiled: ClassVar[dict[str, Program]] = {}

    @classmethod
    def of(cls, specialised: Specialised) -> Program:
        """The compiled program, from the cache if it was built before."""
        key = specialised.source.hash()
        if key not in cls.compiled:
            cls.compiled[key] = cls(specialised)
        return cls.compiled[key]

    def __init__(self, specialised: Specialised) -> None:
        text = without_gpu(lowered(specialised))
        machine = llvm.Target.from_default_triple().create_target_machine(
            opt=0, cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten()
        )
        module = llvm.parse_assembly(text)
        module.triple = llvm.get_default_triple()
        self.engine = llvm.create_mcjit_compiler(module, machine)
        self.engine.finalize_object()
        name, parameters = re.search(r"define void @(\w+)\(([^)]*)\)", text).groups()
        kinds = [kind for kind in specialised.source.signature.values() if kind != "constexpr"]
        types = [ctypes.c_void_p if kind.startswith("*") else SCALARS[kind] for kind in kinds]
        self.spare = [None] * (parameters.count(",") + 1 - len(types))
        signature = ctypes.CFUNCTYPE(None, *types, *(ctypes.c_void_p for _ in self.spare))
        self.function: Callable[..., None] = signature(self.engine.get_function_address(name))
        self.ids = [
            ctypes.c_int32.from_address(self.engine.get_global_value_address(f"program_id_{axis}")) for axis in "xyz"
        ]

    def run(self, grid: tuple[int, ...], arguments: list[Any]) -> None:
        """Call it for every program of the grid."""
        x, y, z = self.ids
        for z.value, y.value, x.value in product(*(range(n) for n in reversed((*grid, 1, 1)[:3]))):
            self.function(*arguments, *self.spare)


def lowered(specialised: Specialised) -> str:
    """LLVM IR for one lane, by Triton's AMD pipeline."""
    backend = make_backend(TARGET)
    options = backend.parse_options({"num_warps": 1, "num_stages": 1})
    object.__setattr__(options, "warp_size", 1)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = specialised.source.make_ir(
        TARGET, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    stages: dict[str, Callable[..., Any]] = {}
    backend.add_stages(stages, options, Language.TRITON)
    metadata = {"target": TARGET, **options.__dict__}
    for stage in ("ttir", "ttgir", "llir"):
        module = stages[stage](module, metadata)
    assert not metadata["shared"], f"{specialised.source.fn.__name__} needs shared memory: one lane cannot run it"
    return str(module)


def without_gpu(text: str) -> str:
    """The IR without metadata and attributes, and with address spaces and AMD intrinsics replaced by those of x86.

    The IR only moves bf16 and widens it by shifts, so it becomes i16: x86 code for bf16 would widen and narrow it on
    every move, and flush subnormals.
    """
    text = re.sub(r"^(target (datalayout|triple)|attributes|!).*$", "", text, flags=re.M)
    text = re.sub(r",? !(?:amdgpu\.)?\w+(?:\.\w+)* !\d+", "", text)
    text = re.sub(r" #\d+(?=\s|$|,)", "", text, flags=re.M)
    text = text.replace("amdgpu_kernel ", "").replace(" local_unnamed_addr", "").replace("samesign ", "")
    text = re.sub(r" addrspace\(\d+\)", "", text)
    text = re.sub(r"\.p[135](?=\W|\.)", ".p0", text)
    text = re.sub(
        r' (captures\([^)]*\)|inreg|dead_on_unwind|memory\([^)]*\)|nofpclass\([^)]*\)|syncscope\("\w+"\))', "", text
    )
    text = re.sub(r" initializes\((?:\([^)]*\)(?:, )?)*\)", "", text)
    text = re.sub(r"^declare[^\n]*@llvm\.amdgcn\.workgroup\.id[^\n]*$", "", text, flags=re.M)
    text = re.sub(r"@llvm\.amdgcn\.workgroup\.id\.([xyz])\(\)", r"@read_program_id_\1()", text)
    text = re.sub(
        r"(?:tail )?call (?:noundef |range\([^)]*\) )*i32 @llvm\.amdgcn\.workitem\.id\.\w\(\)", "add i32 0, 0", text
    )
    text = re.sub(r"@llvm\.amdgcn\.(exp2|sqrt)\.f32\b", r"@llvm.\1.f32", text)
    text = re.sub(r"^declare[^\n]*@llvm\.amdgcn[^\n]*$", "", text, flags=re.M)
    text = re.sub(r"0xR(?=[0-9A-F]{4})", "u0x", text).replace("bfloat", "i16")
    for axis in "xyz":
        text += (
            f"\n@program_id_{axis} = global i32 0\n"
            f"define internal i32 @read_program_id_{axis}() alwaysinline {{\n"
            f"  %id = load i32, ptr @program_id_{axis}\n  ret i32 %id\n}}\n"
        )
    return text
