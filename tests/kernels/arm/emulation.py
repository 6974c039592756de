"""The compiled CPU library for 64-bit ARM: cross-compiled, run in qemu-user, and called as ctypes calls a library.

``serve.cpp`` is linked with the library and runs in the emulator. A call copies the memory behind its pointers there
and back. So the package's own Python code runs on it, from the launchers to the addresses.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from ace_triton.kernels.cpu_abi import HEADER, signatures
from ace_triton.kernels.cpu_sources import COMPILE_ARGUMENTS, digest

ROOT = Path(__file__).parents[3]
SERVER = Path(__file__).with_name("serve.cpp")
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FUNCTIONS = signatures(HEADER.read_text())


def missing() -> str:
    """The programs that this machine lacks for the emulation, and how to install them; "" if it has both."""
    absent = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    return f"needs {' and '.join(absent)} (Debian: apt install g++-aarch64-linux-gnu qemu-user)" if absent else ""


def build() -> Path:
    """Build the library with its server, or find it in build/arm from before; other processes wait meanwhile."""
    folder = ROOT / "build" / "arm"
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"serve-{digest()[:16]}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists() or built.stat().st_mtime < SERVER.stat().st_mtime:
            _build(folder, built)
    return built


def _build(folder: Path, into: Path) -> None:
    (folder / "functions.inc").write_text("".join(f"ACE_CALL({name})\n" for name in FUNCTIONS))
    options = [*COMPILE_ARGUMENTS, "-Wall", "-Wextra"]
    command = [COMPILER, *options, f'-DACE_SOURCES="{digest()}"', f"-I{folder}"]

    def compiled(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        subprocess.run([*command, "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [SERVER, *sorted((ROOT / "kernels" / "cpu").glob("*.cpp"))]))
    linked = into.with_suffix(".new")
    subprocess.run([COMPILER, "-static", "-pthread", *objects, "-o", linked], check=True)
    linked.replace(into)


class EmulatedLibrary:
    """In place of the loaded library: the same functions, run on an emulated processor."""

    def __init__(self, program: Path, processor: str) -> None:
        """Start the server on ``processor``, a model that the emulator knows, for example "max"."""
        command = [EMULATOR, "-cpu", processor, str(program)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._storages: deque[tuple[int, int]] = deque(maxlen=64)

    def __getattr__(self, name: str):
        if name not in FUNCTIONS:
            raise AttributeError(name)
        return partial(self._call, name)

    def close(self) -> None:
        """End the server."""
        self._server.communicate()

    def note(self, tensor: torch.Tensor) -> None:
        """Remember where the memory behind a tensor begins and ends; for every tensor whose address is passed on."""
        storage = tensor.untyped_storage()
        self._storages.appendleft((storage.data_ptr(), storage.nbytes()))

    def _memory_of(self, address: int) -> tuple[int, int]:
        for start, size in self._storages:
            if start <= address < start + size:
                return start, size
        raise ValueError("a call passes an address of no tensor")

    def _call(self, name: str, *arguments: object) -> int | bytes:
        result, parameters = FUNCTIONS[name]
        assert len(arguments) == len(parameters)
        memory: list[tuple[int, int]] = []
        packed = b"".join(self._packed(*pair, memory) for pair in zip(arguments, parameters, strict=True))
        sent = [ctypes.string_at(*region) for region in memory]
        to, back = self._server.stdin, self._server.stdout
        assert to is not None
        assert back is not None
        to.write(struct.pack("3q", list(FUNCTIONS).index(name), len(memory), len(arguments)))
        for contents in sent:
            to.write(struct.pack("Q", len(contents)) + contents)
        to.write(packed)
        to.flush()
        head = back.read(8)
        if len(head) < 8:
            raise RuntimeError(f"{name} crashed in the emulator, with exit status {self._server.wait()}")
        answer: int | bytes = struct.unpack("q", head)[0]
        if result is ctypes.c_char_p:
            answer = back.read(answer)
        for (address, size), contents in zip(memory, sent, strict=True):
            if (received := back.read(size)) != contents:
                ctypes.memmove(address, received, size)
        return answer

    def _packed(self, argument: object, kind: object, memory: list[tuple[int, int]]) -> bytes:
        """An argument as ``serve.cpp`` reads it; the memory behind a pointer is added to ``memory``."""
        if kind in (ctypes.c_float, ctypes.c_double):
            return struct.pack("dq", argument, 0)
        if kind not in (ctypes.c_void_p, ctypes.c_char_p):
            return struct.pack("2q", argument, 0)
        if not argument:
            return struct.pack("2q", -1, 0)
        if isinstance(argument, bytes):
            argument = ctypes.create_string_buffer(argument)
            self._text = argument
            region, address = (ctypes.addressof(argument), len(argument)), ctypes.addressof(argument)
        elif isinstance(argument, int):
            region, address = self._memory_of(argument), argument
        else:  # ctypes.byref(number)
            number = argument._obj  # type: ignore[attr-defined]
            region, address = (ctypes.addressof(number), ctypes.sizeof(number)), ctypes.addressof(number)
        if region not in memory:
            memory.append(region)
        return struct.pack("2q", memory.index(region), address - region[0])
