"""Every Triton body compiles for every kind of GPU, at the edge shapes of its launcher.

The interpreter never sees what the JIT makes of a size of 1, and tests on real layers have none. Here all launches of
benchmarks/harness/edge_cases.py go through the compiler's front end, and some of them through all of it; `make
compile-sweep` takes all of them all the way, for every target.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from triton.runtime.jit import JITFunction

import ace_triton.kernels
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.moments import moments
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.token_statistics import no_layer_sums, no_moments, token_statistics
from ace_triton.kernels.weighted_squares import weighted_squares
from benchmarks.harness.edge_cases import LAUNCHERS, EdgeCase, edge_cases
from benchmarks.reports.compile_sweep import TARGETS, Stage, failures, front_end, kernels, whole
from benchmarks.reports.machine_code import gpu_target

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")


CASES = list(edge_cases())
SMALLEST = [next(case for case in CASES if case.launcher == launcher) for launcher in LAUNCHERS]


def failed(cases: list[EdgeCase], target: str, stage: Stage) -> list[str]:
    outcomes = list(failures(cases, target, stage))
    assert outcomes
    return [line for line in outcomes if line is not None]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_edge_shapes_pass_the_front_end(launcher):
    assert failed([case for case in CASES if case.launcher == launcher], "sm_90", front_end) == []


@pytest.mark.parametrize("case", SMALLEST, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_the_smallest_call_of_a_launcher_compiles(target, case):
    assert failed([case], target, whole) == []


def test_every_kernel_that_a_launcher_starts_is_swept():
    swept = {found.launch.kernel for found in kernels(CASES, gpu_target("sm_90"))}
    started = set(started_kernels())
    assert len(started) > len(LAUNCHERS)
    assert {str(kernel) for kernel in started - swept} == set()


def started_kernels() -> Iterator[JITFunction]:
    """The kernels that the package starts, as ``kernel[grid](...)`` or by a name that it passes on."""
    folder = Path(ace_triton.kernels.__file__).parent
    for file in sorted(folder.glob("*.py")):
        module = import_module(f"ace_triton.kernels.{file.stem}")
        for node in ast.walk(ast.parse(file.read_text())):
            named: list[ast.expr] = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                named = [node.func.value]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"bound_launch.launch", "launched"}:
                first = node.args[0]
                starred = isinstance(first, ast.Starred) and isinstance(first.value, ast.Tuple)
                named = first.value.elts[:1] if starred else [first]
            elif isinstance(node, ast.Assign):
                named = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            for name in named:
                called = getattr(module, getattr(name, "id", ""), None)
                if isinstance(called, JITFunction):
                    yield called


@pytest.mark.parametrize(
    ("call", "most"),
    [
        (lambda n: moments(torch.zeros(1, n, 128)), 5),
        (lambda n: moments(torch.zeros(1, n, 128), torch.ones(1, n, dtype=torch.bool)), 5),
        (lambda n: weighted_squares(torch.zeros(n, 128), torch.zeros(3, n)), 3),
        (lambda n: token_norms(torch.zeros(n, 128)), 3),
        (
            lambda n: token_statistics(
                torch.zeros(1, n, 128),
                None,
                no_moments(128, torch.device("cpu")),
                [torch.zeros(n, 128)] * 3,
                no_layer_sums(3, 128, torch.device("cpu")),
            ),
            6,
        ),
    ],
    ids=["moments", "moments of padded tokens", "weighted_squares", "token_norms", "token_statistics"],
)
def test_batches_of_any_length_share_kernels(call, most):
    """An expert's tokens are another number in every batch."""
    lengths = (*range(1, 70), 96, 127, 333, 512, 777, 1024, 2000, 2048, 30000)
    cases = [EdgeCase("", str(n), partial(call, n)) for n in lengths]
    assert len({found.key for found in kernels(cases, gpu_target("sm_90"))}) <= most
