"""Finds out whether the tests of an operation pass, since only tested code has a speed-up."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]

Verdict = Literal["passed", "failed", "unknown"]


class Gate(Protocol):
    """Whether test files pass."""

    def verdict(self, test_file: str) -> Verdict:
        """The verdict on a file, by its path from the root of the repository."""
        ...


class RunTests:
    """Runs the tests, each file once per session, since the code may have changed after an earlier run."""

    def __init__(self) -> None:
        self._verdict = functools.cache(_run)

    def verdict(self, test_file: str) -> Verdict:
        """Passed or failed; a missing file, or one without tests, counts as failed."""
        return self._verdict(test_file)


class ReadReport:
    """Reads a JUnit report of tests that ran just before; tests that are not in it are unknown.

    Args:
        report: a file from ``pytest --junitxml``.
        must_name: a word that the name of at least one passed test must have, as "cuda" if a GPU is timed.
    """

    def __init__(self, report: Path, must_name: str = "") -> None:
        self._cases = ElementTree.parse(report).findall(".//testcase") if report.is_file() else []
        self._must_name = must_name

    def verdict(self, test_file: str) -> Verdict:
        """Failed if a test of the file failed; passed if some ran and none failed."""
        module = Path(test_file).with_suffix("").as_posix().replace("/", ".")
        cases = [case for case in self._cases if f"{case.get('classname')}.".startswith(f"{module}.")]
        if any(case.find("failure") is not None or case.find("error") is not None for case in cases):
            return "failed"
        passed = [case for case in cases if case.find("skipped") is None]
        return "passed" if any(self._must_name in case.get("name", "") for case in passed) else "unknown"


def verdict_of(gate: Gate, test_files: Sequence[str]) -> tuple[Verdict, str]:
    """The worst verdict on some files, and the first file that has it."""
    verdicts = {file: gate.verdict(file) for file in test_files}
    for bad in ("failed", "unknown"):
        for file, verdict in verdicts.items():
            if verdict == bad:
                return verdict, file
    return ("passed", test_files[0]) if test_files else ("unknown", "no test file named")


def _run(test_file: str) -> Verdict:
    if not (ROOT / test_file).exists():
        return "failed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test_file]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return "passed" if done.returncode == 0 else "failed"
