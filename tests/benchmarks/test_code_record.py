"""The record of the machine-code report: it is used for kernels that compile to the same code, and for no others."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from ace_triton.kernels.backend import interpreting
from benchmarks.harness.block_cases import block_cases
from benchmarks.harness.code_record import CodeRecord, digest_of
from benchmarks.harness.jit_launches import JitLaunch, launches_on
from benchmarks.harness.kernel_cases import every_case
from benchmarks.reports.machine_code import compiled, recorded

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")

HOPPER, MI300 = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)

SOURCE = """
import triton
import triton.language as tl

FACTOR = tl.constexpr(2)


@triton.constexpr_function
def one_less(number):
    return number - 1


@triton.jit
def scaled(x):
    return x * FACTOR + one_less(FACTOR)


@triton.jit
def kernel(numbers_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(numbers_ptr + i, scaled(tl.load(numbers_ptr + i, mask=i < n)), mask=i < n)
"""


def module(folder: Path, source: str = SOURCE) -> ModuleType:
    file = folder / f"kernels_{len(list(folder.iterdir()))}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def launch(kernels: ModuleType, n: int = 64, block: int = 128, **options: int) -> JitLaunch:
    return JitLaunch(kernels.kernel, (1,), (torch.empty(256), n), {"BLOCK": block, **options})


def digest(kernels: ModuleType, target: GPUTarget = HOPPER, **changes: int) -> str:
    started = launch(kernels, **changes)
    return digest_of(started.kernel, started.specialise(target), target)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\n\n@triton", "\n\n\n# A comment.\n@triton"),
        ("    return x", '    """Says what it does."""\n    return x'),
        ("tl.store(numbers_ptr + i, ", "tl.store(\n        numbers_ptr + i, "),
    ],
    ids=["comment", "docstring", "layout"],
)
def test_what_does_not_reach_the_compiler_is_left_out(tmp_path, old, new):
    assert digest(module(tmp_path)) == digest(module(tmp_path, SOURCE.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mask=i < n)), mask", "mask=i < n, other=1)), mask"),
        ("x *", "x +"),
        ("expr(2)", "expr(3)"),
        ("number -", "number +"),
    ],
)
def test_a_change_of_a_kernel_a_function_or_a_constant_counts(tmp_path, old, new):
    assert old in SOURCE
    assert digest(module(tmp_path)) != digest(module(tmp_path, SOURCE.replace(old, new)))


def test_a_change_of_the_launch_or_the_compiler_counts(tmp_path, monkeypatch):
    kernels = module(tmp_path)
    digests = [
        *(digest(kernels), digest(kernels, MI300), digest(kernels, n=65), digest(kernels, n=1)),
        *(digest(kernels, block=64), digest(kernels, num_warps=8)),
    ]
    monkeypatch.setattr(triton, "__version__", "another")
    digests.append(digest(kernels))
    assert len(set(digests)) == len(digests)


def test_an_unchanged_kernel_is_read_from_the_file(tmp_path, monkeypatch):
    kernels, file = module(tmp_path), tmp_path / "record.json"
    first = CodeRecord(file)
    codes = [first.code(target.backend, launch(kernels), target) for target in (HOPPER, MI300)]
    assert (first.compiled, first.reused) == (2, 0)
    assert codes[0] == compiled(launch(kernels), HOPPER)
    first.write()
    monkeypatch.setattr(triton, "compile", lambda *_, **__: pytest.fail("compiled again"))
    second = CodeRecord(file)
    hopper, mi300 = (second.code(target.backend, launch(kernels), target) for target in (HOPPER, MI300))
    assert (second.compiled, second.reused) == (0, 2)
    assert hopper == codes[0]
    assert vars(mi300) | {"occupancy": 0} == vars(codes[1]) | {"occupancy": 0}
    assert math.isnan(mi300.occupancy)


def test_a_changed_kernel_replaces_its_entry(tmp_path):
    file = tmp_path / "record.json"
    first = CodeRecord(file)
    first.code("kernel", launch(module(tmp_path)), HOPPER)
    first.code("gone", launch(module(tmp_path)), HOPPER)
    first.write()
    second = CodeRecord(file)
    changed = launch(module(tmp_path, SOURCE.replace("x *", "x + x *")))
    assert second.code("kernel", changed, HOPPER) == compiled(changed, HOPPER)
    assert (second.compiled, second.reused) == (1, 0)
    second.forget_others()
    second.write()
    assert file.read_text().count("digest") == 1


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", "<<<<<<< HEAD\n{}", '{"kernel": 3}', '{"kernel": {"digest": "0"}}', '{"kernel": {}}']
)
def test_a_damaged_file_is_named_and_kept(tmp_path, damaged):
    file = tmp_path / "record.json"
    file.write_text(damaged)
    with pytest.raises(ValueError, match=r"record\.json is not a record of machine code .*: restore it, or remove it"):
        CodeRecord(file)
    assert file.read_text() == damaged


def test_an_entry_without_its_digest_is_damage(tmp_path):
    file = tmp_path / "record.json"
    record = CodeRecord(file)
    record.code("kernel", launch(module(tmp_path)), HOPPER)
    record.write()
    file.write_text(file.read_text().replace("digest", "other"))
    with pytest.raises(ValueError, match="is not a record of machine code"):
        CodeRecord(file)


def test_a_run_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    record = CodeRecord(file)
    record.code("kernel", launch(module(tmp_path)), HOPPER)
    record.write()
    before = file.read_text()

    def killed(partial: Path, text: str) -> None:
        with partial.open("w") as stream:
            stream.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            record.write()
    assert file.read_text() == before
    CodeRecord(file)


def test_launches_of_the_report_hold_no_tensors(tmp_path, monkeypatch):
    case = next(case for case in every_case() if case.name == "token_norms")
    monkeypatch.setattr(CodeRecord, "code", lambda *_: None)
    found, _ = recorded(case, "sm_90", CodeRecord(tmp_path / "record.json"))
    assert found.arguments == ()
    assert found.grid == launches_on(HOPPER, case.call)[case.launch].grid


def test_no_two_cases_of_the_report_share_a_name():
    names = [(case.name, case.dtype) for case in (*every_case(), *block_cases())]
    assert len(set(names)) == len(names)
