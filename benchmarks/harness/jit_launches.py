"""Catches Triton launches before they reach a driver, specialized as the JIT would for a target that is not here.

A caught launch has the signature, alignment promises, constants and block sizes that a public launcher chose. So a
machine-code report or an executor never repeats them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ace_triton.kernels import backend, launch


@dataclass(frozen=True)
class Specialised:
    """A launch for one target: what to compile, and the arguments that remain at run time."""

    source: ASTSource
    options: dict[str, Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class JitLaunch:
    """One ``kernel[grid](*arguments, **keywords)``."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def specialise(self, target: GPUTarget) -> Specialised:
        """Bind the arguments as the JIT does when it runs on ``target``."""
        compiler = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, compiler)
        bound, specialization, options = bind(*self.arguments, **self.keywords)
        _, signature, constants, attributes = self.kernel._pack_args(
            compiler, self.keywords, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        remaining = tuple(bound[name] for name, kind in signature.items() if kind != "constexpr")
        return Specialised(source, options, remaining)


@dataclass(frozen=True)
class CaughtKernel:
    """Stands in for the compiled kernel that a launch gives, so that launches of it are caught too."""

    kernel: JITFunction
    options: dict[str, Any]
    handle: Callable[[JitLaunch], None]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.handle(JitLaunch(self.kernel, grid, arguments, self.options))


def launches_on(target: GPUTarget, call: Callable[[], object]) -> list[JitLaunch]:
    """What the public launchers in ``call`` would launch on ``target``, in order."""
    launches: list[JitLaunch] = []
    amd = target.backend == "hip"
    with caught_launches(launches.append, target.warp_size, amd, before_ampere=not amd and target.arch < 80):
        call()
    return launches


@contextmanager
def caught_launches(
    handle: Callable[[JitLaunch], None], lanes: int = 32, amd: bool = False, before_ampere: bool = False
) -> Iterator[None]:
    """Run CPU tensors through the Triton bodies, and pass every launch to ``handle`` instead of a driver.

    Repetitions of a recorded call (:mod:`ace_triton.kernels.bound_launch`) are passed to it too.

    Args:
        handle: called with each launch, in order.
        lanes: lanes of a warp that the launchers shall plan for (64 on AMD's CDNA).
        amd: whether they shall plan for AMD.
        before_ampere: whether they shall plan for an NVIDIA GPU older than Ampere.
    """

    def run(kernel: JITFunction, *arguments: Any, grid: tuple[int, ...], warmup: bool, **keywords: Any) -> CaughtKernel:
        handle(JitLaunch(kernel, grid, arguments, keywords))
        options = {name: value for name, value in keywords.items() if name not in kernel.arg_names}
        return CaughtKernel(kernel, options, handle)

    with (
        mock.patch.dict(os.environ, {backend.ENVIRONMENT_VARIABLE: "triton"}),
        mock.patch.object(backend, "interpreting", return_value=True),
        mock.patch.object(launch, "lanes", return_value=lanes),
        mock.patch.object(launch, "on_amd", return_value=amd),
        mock.patch.object(launch, "before_ampere", return_value=before_ampere),
        mock.patch.object(JITFunction, "run", run),
    ):
        yield
