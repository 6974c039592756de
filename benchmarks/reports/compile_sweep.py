"""Compile every launch of every launcher at edge shapes, for every kind of GPU, without one.

python -m benchmarks.reports.compile_sweep [--target sm_75 ...] [--launcher moments ...]

Says what does not compile, needs more shared memory than a block may have, or launches a grid that no GPU takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import make_backend

from ..harness.edge_cases import EdgeCase, edge_cases
from ..harness.jit_launches import JitLaunch, Specialised, launches_on
from .machine_code import gpu_target

TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

SHARED_BYTES = {75: 64 * 1024, 80: 163 * 1024, 120: 99 * 1024, "gfx942": 64 * 1024}
"""That a block may have, for targets with less than the 227 KiB of Hopper."""
MOST_SHARED_BYTES = 227 * 1024

GRID = (2**31 - 1, 65535, 65535)
"""Most programs along the axes of a grid; the same on AMD, which has more along the first."""

Stage = Callable[["Launched"], None]


@dataclass(frozen=True)
class Launched:
    """A kernel that a launcher starts at an edge shape.

    Attributes:
        case: the call.
        launch: what it launches.
        target: where.
    """

    case: EdgeCase
    launch: JitLaunch
    target: GPUTarget

    @cached_property
    def specialised(self) -> Specialised:
        """As the JIT does."""
        return self.launch.specialise(self.target)

    @property
    def key(self) -> tuple[object, ...]:
        """What makes another kernel."""
        source = self.specialised.source
        parts = source.signature, source.constants, source.attrs, self.specialised.options
        return self.launch.kernel, *map(str, parts)

    def check_grid(self) -> None:
        """Raise ValueError for a grid without programs, which a driver skips in silence, or one that is too large."""
        for axis, (size, most) in enumerate(zip(self.launch.grid, GRID, strict=False)):
            if not 0 < size <= most:
                raise ValueError(f"{size} programs along axis {axis} of the grid, of 1 to {most} that it may have")


def kernels(cases: Iterable[EdgeCase], target: GPUTarget) -> Iterator[Launched]:
    """Every launch of the cases on ``target``."""
    for case in cases:
        for launch in launches_on(target, case.call):
            yield Launched(case, launch, target)


def front_end(found: Launched) -> None:
    """Compile a kernel as far as Triton's own IR, which takes a twentieth of the time: what is wrong with a body's
    types, shapes and arguments shows there."""
    backend = make_backend(found.target)
    options = backend.parse_options(found.specialised.options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options), backend.get_module_map()
    module = found.specialised.source.make_ir(found.target, options, *functions, context)
    stages: dict[str, Callable[..., object]] = {}
    backend.add_stages(stages, options, Language.TRITON)
    stages["ttir"](module, {"target": found.target, **options.__dict__})


def whole(found: Launched) -> None:
    """Compile a kernel to machine code; ValueError where it needs more shared memory than there is."""
    target = found.target
    code = triton.compile(found.specialised.source, target=target, options=found.specialised.options)
    most = SHARED_BYTES.get(target.arch, MOST_SHARED_BYTES)
    if code.metadata.shared > most:
        raise ValueError(f"{code.metadata.shared} bytes of shared memory, of {most} that a block may have")


def failures(cases: Iterable[EdgeCase], name: str, stage: Stage) -> Iterator[str | None]:
    """For each kernel, None or a line that says what failed on the target ``name``."""
    seen: set[tuple[object, ...]] = set()
    for found in kernels(cases, gpu_target(name)):
        try:
            found.check_grid()
            if found.key in seen:
                continue
            seen.add(found.key)
            stage(found)
        except Exception as error:  # a compiler may raise anything
            what = (str(error).strip().splitlines() or [""])[-1]
            kernel = found.launch.kernel.__name__
            yield f"{name}: {kernel} of {found.case}: {type(error).__name__}: {what}"
        else:
            yield None


def main() -> None:
    """Compile; exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", help=f"of {', '.join(TARGETS)}; all if left out")
    parser.add_argument(
        "--launcher", action="append", help="as benchmarks/harness/edge_cases.py names them; all if left out"
    )
    arguments = parser.parse_args()
    cases = [case for case in edge_cases() if not arguments.launcher or case.launcher in arguments.launcher]
    failed = 0
    for name in arguments.target or TARGETS:
        outcomes = list(failures(cases, name, whole))
        wrong = [line for line in outcomes if line is not None]
        print(*wrong, f"{name}: {len(outcomes)} kernels, {len(wrong)} failed", sep="\n", flush=True)
        failed += len(wrong)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
