"""Time a packed linear layer beside the dense one, by number of rows."""

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

COLD_BYTES = 128 * 2**20
"""Copies of the layer that fill this much take turns, as a model's layers do: none finds itself in a cache."""

SECONDS = 1.5
FEWEST_ROUNDS, MOST_ROUNDS = 3, 200

LOSES = 1.02
"""A product that takes more than this many times the dense one's time is called slower."""

Side = Literal["dense", "packed", "unpacked", "semi_structured"]

Call = Callable[[torch.Tensor, int], object]


@dataclass(frozen=True)
class LayerKind:
    """Packed layers of one shape, pattern and dtype.

    Attributes:
        shape: (out_features, in_features).
        n, m: the pattern.
        dtype: of weights and tokens.
        count: how many such layers there are.
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
    """Medians of one layer's time for a number of rows, in milliseconds.

    Attributes:
        rows: tokens in a call.
        dense: ``F.linear`` with the dense weight in memory.
        packed: our kernel.
        unpacked: the weight unpacked for the call, then ``F.linear``.
        semi_structured: torch's 2:4 product, conversion done before; None where torch has none for the layer.
        product: which of them NMLinear takes.
    """

    rows: int
    dense: float
    packed: float
    unpacked: float
    semi_structured: float | None
    product: Product

    @property
    def taken(self) -> float:
        """Time of the product that NMLinear takes."""
        if self.product == "semi_structured":
            assert self.semi_structured is not None
            return self.semi_structured
        return self.packed if self.product == "packed" else self.unpacked

    @property
    def loses(self) -> bool:
        """Whether NMLinear is slower than a dense layer."""
        return self.taken > LOSES * self.dense


@dataclass(frozen=True)
class LayerTimes:
    """One kind of layer on one device.

    Attributes:
        kind: the layers.
        device: what they ran on.
        dense_bytes, packed_bytes: of one layer's weight.
        why_no_semi_structured: why torch's 2:4 product was not timed, or None.
        times: one entry for each number of rows, in order.
    """

    kind: LayerKind
    device: str
    dense_bytes: int
    packed_bytes: int
    why_no_semi_structured: str | None
    times: tuple[RowTimes, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "kind": {**asdict(self.kind), "dtype": str(self.kind.dtype).removeprefix("torch.")}}


def kinds_of(model: nn.Module) -> list[LayerKind]:
    """The kinds of packed layers in a model, in order of first appearance."""
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
    """Time a layer of random weights of a kind.

    All sides are called in turn in every round, each time with the next of several copies of the weight, so
    that a change of clocks meets all of them and none finds its weight in a cache.

    Args:
        kind: the layer.
        device: where to.
        rows: numbers of rows.
        limits: of the dispatch; None for the device's own.
        seconds: to spend on each number of rows, about; at least three rounds are made.
        progress: called with (done, total).

    Raises:
        ValueError: no number of rows, or one below 1.
    """
    if not rows or min(rows) < 1:
        raise ArgumentError(f"rows must be numbers from 1 on, got {list(rows)}")
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
    """All packed layers of a model, one call each, in milliseconds.

    Attributes:
        rows: tokens in a call.
        dense: with dense weights in memory.
        taken: as NMLinear runs them.
    """

    rows: int
    dense: float
    taken: float


def totals(layers: Sequence[LayerTimes]) -> list[TotalTimes]:
    """Sums over kinds of layers that were timed with the same numbers of rows, by how many there are of each."""
    found = []
    for entries in zip(*(layer.times for layer in layers), strict=True):
        counted = list(zip(entries, (layer.kind.count for layer in layers), strict=True))
        dense = sum(count * entry.dense for entry, count in counted)
        found.append(TotalTimes(entries[0].rows, dense, sum(count * entry.taken for entry, count in counted)))
    return found


def best_limits(times: Sequence[RowTimes]) -> RowLimits:
    """Limits under which each number of rows that was timed takes the fastest product, as far as limits can say."""
    ordered = sorted(times, key=lambda entry: entry.rows)
    packed = 0
    for entry in ordered:
        if entry.packed > min(entry.unpacked, entry.semi_structured or entry.unpacked):
            break
        packed = entry.rows
    wins = [e.rows for e in ordered if e.semi_structured is not None and e.semi_structured < min(e.packed, e.unpacked)]
    return RowLimits(packed, min(wins) if wins else None)


def _weights(kind: LayerKind, device: torch.device) -> list[PackedNM]:
    """Copies of a packed weight."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(kind.shape, generator=generator, dtype=torch.float32, device="cpu").to(device, kind.dtype)
    first = pack_nm(select_nm(dense, ScoreTerms(), kind.n, kind.m), kind.n, kind.m)
    copies = min(MOST_ROUNDS, max(2, -(-COLD_BYTES // first.packed_bytes)))
    return [dataclasses.replace(first, values=first.values.clone(), meta=first.meta.clone()) for _ in range(copies)]


def _calls(weights: Sequence[PackedNM]) -> dict[Side, Call]:
    """The sides; each takes tokens and the number of the copy."""
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
    """Milliseconds of each side, None for one that is not there."""
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
