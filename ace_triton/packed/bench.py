"""Time packed linear layers against dense ones, for several numbers of rows."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..errors import ArgumentError
from ..kernels.nm_linear import nm_linear
from ..kernels.pack_nm import PackedNM, pack_nm
from ..kernels.score_terms import ScoreTerms
from ..kernels.select_nm import select_nm
from ..kernels.unpack_nm import unpack_nm
from .dispatch import Product, RowLimits, choose_product, unpacked_linear
from .nm_linear import NMLinear
from .semi_structured import refusal, semi_structured_linear

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
"""Numbers of rows (tokens of a call) that are timed by default."""

COLD_BYTES = 128 * 2**20
"""Total size in bytes of the copies of a layer, which are used in turn, so that none of them is still in a cache."""

SECONDS = 1.5
"""Default time to spend on one number of rows."""

FEWEST_ROUNDS, MOST_ROUNDS = 3, 200

LOSES = 1.02
"""A packed layer is called slower if it takes more than this many times the time of the dense layer."""

Side = Literal["dense", "packed", "unpacked", "semi_structured"]

Call = Callable[[torch.Tensor, int], object]


@dataclass(frozen=True)
class LayerKind:
    """Packed layers of one shape, pattern and dtype.

    Attributes:
        shape: (out_features, in_features).
        n, m: n of every m inputs are kept.
        dtype: dtype of weights and tokens.
        count: number of such layers in the model.
    """

    shape: tuple[int, int]
    n: int
    m: int
    dtype: torch.dtype
    count: int = 1

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]} {self.n}:{self.m} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class RowTimes:
    """Median times of one layer for one number of rows, in milliseconds.

    Attributes:
        rows: tokens of the call.
        dense: ``F.linear`` with the dense weight in memory.
        packed: our kernel.
        unpacked: the weight is unpacked during the call, then ``F.linear``.
        semi_structured: torch's 2:4 product, without the conversion of the weight; None if torch does not support the
            layer.
        product: the product that NMLinear chooses.
    """

    rows: int
    dense: float
    packed: float
    unpacked: float
    semi_structured: float | None
    product: Product

    @property
    def taken(self) -> float:
        """Time of the product that NMLinear chooses."""
        if self.product == "semi_structured":
            assert self.semi_structured is not None
            return self.semi_structured
        return self.packed if self.product == "packed" else self.unpacked

    @property
    def loses(self) -> bool:
        """True if NMLinear is slower than the dense layer."""
        return self.taken > LOSES * self.dense


@dataclass(frozen=True)
class LayerTimes:
    """Times of one kind of layer on one device.

    Attributes:
        kind: the kind of layer.
        device: name of the device.
        dense_bytes, packed_bytes: size of one layer's weight, dense and packed.
        why_no_semi_structured: why torch's 2:4 product was not timed; None if it was.
        times: one entry per number of rows, in the given order.
    """

    kind: LayerKind
    device: str
    dense_bytes: int
    packed_bytes: int
    why_no_semi_structured: str | None
    times: tuple[RowTimes, ...]

    def to_dict(self) -> dict[str, Any]:
        """The times as JSON types."""
        return {**asdict(self), "kind": {**asdict(self.kind), "dtype": str(self.kind.dtype).removeprefix("torch.")}}


def kinds_of(model: nn.Module) -> list[LayerKind]:
    """List the kinds of packed layers in a model, in order of first appearance."""
    layers = [module for module in model.modules() if isinstance(module, NMLinear)]
    counts = Counter(((a.out_features, a.in_features), a.n, a.m, a.values.dtype) for a in layers)
    return [LayerKind(*key, count) for key, count in counts.items()]


def bench_layer(
    kind: LayerKind,
    device: str | torch.device,
    *,
    rows: Sequence[int] = ROWS,
    limits: RowLimits | None = None,
    seconds: float = SECONDS,
    progress: Callable[[int, int], None] | None = None,
) -> LayerTimes:
    """Time one kind of layer, with random weights.

    Every round calls each product once, and each round uses the next copy of the weight. So a change of the clock rate
    affects all products alike, and no weight is still in a cache.

    Args:
        kind: the kind of layer.
        device: device to run on.
        rows: numbers of rows to time.
        limits: limits that choose NMLinear's product; None for the defaults of the device.
        seconds: approximate time to spend on each number of rows; at least three rounds are run.
        progress: called with (done, total) after each number of rows.

    Raises:
        ArgumentError: if ``rows`` is empty or has a number below 1.
    """
    if not rows or min(rows) < 1:
        raise ArgumentError(f"rows must be one or more numbers of at least 1, got {list(rows)}")
    device = torch.device(device)
    weights = _weights(kind, device)
    why_not = refusal(weights[0])
    calls = _calls(weights)
    times: list[RowTimes] = []
    for done, count in enumerate(rows, 1):
        generator = torch.Generator().manual_seed(count)
        tokens = torch.randn(count, kind.shape[1], generator=generator, dtype=torch.float32, device="cpu")
        medians = _medians(calls, len(weights), tokens.to(device, kind.dtype), seconds)
        product = choose_product(count, weights[0], limits)
        times.append(RowTimes(count, **medians, product=product))  # type: ignore[arg-type]
        if progress is not None:
            progress(done, len(rows))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return LayerTimes(kind, name, weights[0].dense_bytes, weights[0].packed_bytes, why_not, tuple(times))


@dataclass(frozen=True)
class TotalTimes:
    """Total time of one call of every packed layer of a model, in milliseconds.

    Attributes:
        rows: tokens of a call.
        dense: time with dense layers.
        taken: time with NMLinear.
    """

    rows: int
    dense: float
    taken: float


def totals(layers: Sequence[LayerTimes]) -> list[TotalTimes]:
    """Sum the times of all layers, for each number of rows. All kinds must be timed with the same numbers of rows."""
    found = []
    for entries in zip(*(layer.times for layer in layers), strict=True):
        counted = list(zip(entries, (layer.kind.count for layer in layers), strict=True))
        dense = sum(count * entry.dense for entry, count in counted)
        found.append(TotalTimes(entries[0].rows, dense, sum(count * entry.taken for entry, count in counted)))
    return found


def best_limits(times: Sequence[RowTimes]) -> RowLimits:
    """The limits that choose the fastest product for each timed number of rows, as far as limits can express it."""
    ordered = sorted(times, key=lambda entry: entry.rows)
    packed = 0
    for entry in ordered:
        if entry.packed > min(entry.unpacked, entry.semi_structured or entry.unpacked):
            break
        packed = entry.rows
    wins = [e.rows for e in ordered if e.semi_structured is not None and e.semi_structured < min(e.packed, e.unpacked)]
    return RowLimits(packed, min(wins) if wins else None)


def _weights(kind: LayerKind, device: torch.device) -> list[PackedNM]:
    """Make copies of one packed weight, COLD_BYTES in total."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(kind.shape, generator=generator, dtype=torch.float32, device="cpu").to(device, kind.dtype)
    first = pack_nm(select_nm(dense, ScoreTerms(), kind.n, kind.m), kind.n, kind.m)
    copies = min(MOST_ROUNDS, max(2, -(-COLD_BYTES // first.packed_bytes)))
    return [dataclasses.replace(first, values=first.values.clone(), meta=first.meta.clone()) for _ in range(copies)]


def _calls(weights: Sequence[PackedNM]) -> dict[Side, Call]:
    """The products to time. Each takes tokens and the index of a copy of the weight."""
    dense = [unpack_nm(weight) for weight in weights]
    calls: dict[Side, Call] = {
        "dense": lambda tokens, copy: nn.functional.linear(tokens, dense[copy]),
        "packed": lambda tokens, copy: nm_linear(tokens, weights[copy]),
        "unpacked": lambda tokens, copy: unpacked_linear(tokens, weights[copy - len(weights) // 2], None),
    }
    if refusal(weights[0]) is None:
        calls["semi_structured"] = lambda tokens, copy: semi_structured_linear(
            tokens, weights[copy], None, second_copy=True
        )
        for weight in weights:
            semi_structured_linear(weight.values.new_zeros(1, weight.shape[1]), weight, None, second_copy=True)
    return calls


@torch.inference_mode()
def _medians(calls: Mapping[Side, Call], copies: int, tokens: torch.Tensor, seconds: float) -> dict[Side, float | None]:
    """Median milliseconds of each product; None for a product that is not timed."""
    spent: dict[Side, list[float]] = {side: [] for side in calls}
    for call in calls.values():
        call(tokens, -1)
    started = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        if turn >= FEWEST_ROUNDS and time.perf_counter() - started > seconds:
            break
        for side, call in calls.items():
            spent[side].append(_milliseconds(call, tokens, turn % copies))
    return {side: statistics.median(spent[side]) if side in spent else None for side in get_args(Side)}


def _milliseconds(call: Call, tokens: torch.Tensor, copy: int) -> float:
    if tokens.device.type != "cuda":
        start = time.perf_counter()
        call(tokens, copy)
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call(tokens, copy)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
