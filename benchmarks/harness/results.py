"""The file of results that every benchmark appends to."""

from __future__ import annotations

import csv
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

OURS = "ace_triton"


@dataclass(frozen=True)
class Setting:
    """What a figure was measured with.

    Attributes:
        device: name of the processor or the GPU.
        threads: number of torch's threads on the CPU.
        evidence: "CPU time, measured", "GPU time, measured" or "wall time, measured"; or "dry run", which means that
            times say nothing.
        torch, triton, ace_triton: versions; "" if not installed.
        date: UTC, ISO 8601; the same for all providers of one comparison.
    """

    device: str
    threads: int
    evidence: str
    torch: str
    triton: str
    ace_triton: str
    date: str

    @classmethod
    def here(cls, device: torch.device, dry_run: bool = False) -> Setting:
        """The present time on this machine."""
        on_gpu = device.type == "cuda"
        return cls(
            torch.cuda.get_device_name(device) if on_gpu else processor(),
            torch.get_num_threads(),
            "dry run" if dry_run else f"{'GPU' if on_gpu else 'CPU'} time, measured",
            torch.__version__,
            installed("triton"),
            installed("ace-triton"),
            datetime.now(UTC).isoformat(timespec="milliseconds"),
        )


@dataclass(frozen=True)
class Result:
    """One provider of one operation at one shape.

    Attributes:
        op: operation and variant ("prune 2:4, wanda").
        provider: "ace_triton", or the name of another implementation.
        shape: "4096x11008", or the name of a model.
        dtype: "bfloat16".
        p20, p50, p80: percentiles of the seconds of a call; CPU time on a CPU, device time on a GPU.
        wall: median seconds by the wall clock on a GPU; 0 on a CPU.
        rounds: number of calls.
        bytes: the fewest bytes that the operation can move; 0 if its time does not depend on them.
        tests: "passed" if the operation's tests passed just before; without that there is no speed-up.
    """

    op: str
    provider: str
    shape: str
    dtype: str
    p20: float
    p50: float
    p80: float
    wall: float
    rounds: int
    bytes: int
    tests: str
    setting: Setting

    @classmethod
    def of(
        cls,
        op: str,
        provider: str,
        shape: Sequence[int | str],
        dtype: torch.dtype,
        seconds: Sequence[float],
        least_bytes: int,
        tests: str,
        setting: Setting,
        wall: float = 0.0,
    ) -> Result:
        """From the seconds of at least two rounds."""
        tenths = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(
            op,
            provider,
            "x".join(map(str, shape)),
            str(dtype).removeprefix("torch."),
            *(tenths[1], statistics.median(seconds), tenths[7]),
            wall,
            len(seconds),
            least_bytes,
            tests,
            setting,
        )

    @property
    def bandwidth(self) -> float:
        """The fewest bytes over the median time, in GB/s."""
        return self.bytes / self.p50 / 1e9


@dataclass(frozen=True)
class Outcome:
    """Results of one comparison, one for each provider, ours first."""

    results: tuple[Result, ...]

    @property
    def ours(self) -> Result:
        """The result of ace_triton."""
        return self.results[0]

    @property
    def others(self) -> tuple[Result, ...]:
        """The results of the other providers."""
        return self.results[1:]

    @property
    def speedups(self) -> dict[str, float]:
        """By provider, its median time over ours; empty unless the operation's tests passed."""
        if any(result.tests != "passed" for result in self.results):
            return {}
        return {other.provider: other.p50 / self.ours.p50 for other in self.others}


COLUMNS = (*(f.name for f in fields(Result) if f.name != "setting"), *(f.name for f in fields(Setting)))


def append(path: Path, results: Iterable[Result]) -> None:
    """Append lines to the file in one write; a new file gets a header.

    Raises:
        ValueError: if the file has different columns.
    """
    fresh = not path.exists()
    if not fresh:
        _check_header(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        writer.writerows([*_own(result), *astuple(result.setting)] for result in results)
        file.flush()
        os.fsync(file.fileno())


def load(path: Path) -> list[Result]:
    """All results in the file, oldest first; empty if there is no file."""
    if not path.exists():
        return []
    _check_header(path)
    with path.open(newline="") as file:
        return [_parsed(row) for row in csv.DictReader(file)]


def outcomes(results: Iterable[Result]) -> list[Outcome]:
    """The newest comparison of every operation, shape, dtype and machine, in the order of the first ones."""
    together: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        together.setdefault((*_what(result), result.setting.date), []).append(result)
    newest: dict[tuple[str, ...], Outcome] = {}
    for (*what, _), found in together.items():
        ours_first = sorted(found, key=lambda result: result.provider != OURS)
        newest[tuple(what)] = Outcome(tuple(ours_first))
    return list(newest.values())


def _what(result: Result) -> tuple[str, ...]:
    setting = result.setting
    return result.op, result.shape, result.dtype, setting.device, str(setting.threads), setting.evidence


def _own(result: Result) -> list[object]:
    return [f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(result).items() if k != "setting"]


def _parsed(row: dict[str, str]) -> Result:
    setting = Setting(**{f.name: row[f.name] for f in fields(Setting)} | {"threads": int(row["threads"])})
    numbers = {name: float(row[name]) for name in ("p20", "p50", "p80", "wall")}
    counts = {name: int(row[name]) for name in ("rounds", "bytes")}
    words = {name: row[name] for name in ("op", "provider", "shape", "dtype", "tests")}
    return Result(**words, **numbers, **counts, setting=setting)


def _check_header(path: Path) -> None:
    with path.open(newline="") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != COLUMNS:
        raise ValueError(f"{path} has columns {','.join(header)}; expected {','.join(COLUMNS)}: rename the file")


def installed(package: str) -> str:
    """A package's version; "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
