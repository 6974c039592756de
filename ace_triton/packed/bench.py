"""Time packed linear layers against dense ones, for several numbers of rows."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..kernels.pack_nm import pack_nm
from ..kernels.pack_rows import pack_rows
from ..kernels.packed_dense import quantize_dense
from ..kernels.quantize_nm import quantize_nm
from ..kernels.score_terms import ScoreTerms
from ..kernels.select_nm import select_nm
from .dispatch import choose_product
from .nm_linear import NMLinear
from .packed_linear import PackedLinear
from .products import DENSE_COPY, Packed, Product, RowLimits, registry
from .quantized_linear import QuantizedLinear, TiedLinear
from .unpacked import unpacked_weight

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
"""Numbers of rows (tokens of a call) that are timed by default."""

COLD_BYTES = 128 * 2**20
"""Total size in bytes of the copies of a layer, which are used in turn, so that none of them is still in a cache."""

SECONDS = 1.5
"""Default time to spend on one number of rows."""

FEWEST_ROUNDS, MOST_ROUNDS = 3, 200

LOSES = 1.02
"""A packed layer is called slower if it takes more than this many times the time of the dense layer."""

DENSE_LAYER = "dense layer"
"""Stands for ``F.linear`` with the dense weight beside the names of products."""

Call = Callable[[torch.Tensor, int], object]


@dataclass(frozen=True)
class LayerKind:
    """Packed layers of one shape, pattern and dtype.

    Attributes:
        shape: (out_features, in_features).
        n, m: n of every m inputs are kept; None if the zeros follow no pattern, or if the weight is not pruned.
        dtype: dtype of weights and tokens.
        count: number of such layers in the model.
        kept: share of kept weights, rounded to percents, if the zeros follow no pattern.
        bits: bits of a quantized value; None for weights that are not quantized.
        group: number of inputs that share a scale, for quantized weights.
    """

    shape: tuple[int, int]
    n: int | None
    m: int | None
    dtype: torch.dtype
    count: int = 1
    kept: float | None = None
    bits: int | None = None
    group: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The kind as JSON types; ``kept`` only if the zeros follow no pattern."""
        content = {**asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}
        if self.kept is None:
            del content["kept"]
        return content

    def __str__(self) -> str:
        pattern = "dense" if self.n is None else f"{self.n}:{self.m}"
        if self.kept is not None:
            pattern = f"unstructured, {self.kept:.0%} kept,"
        few = "" if self.bits is None else f", {self.bits} bits"
        return f"{self.shape[0]}x{self.shape[1]} {pattern} {str(self.dtype).removeprefix('torch.')}{few}"


@dataclass(frozen=True)
class RowTimes:
    """Median times of one layer for one number of rows, in milliseconds.

    Attributes:
        rows: tokens of the call.
        dense: ``F.linear`` with the dense weight in memory.
        products: time of each product by name, without the conversion of the weight. Products that cannot compute the
            call are left out.
        product: the product that NMLinear chooses.
    """

    rows: int
    dense: float
    products: Mapping[str, float]
    product: str

    @property
    def taken(self) -> float:
        """Time of the product that NMLinear chooses."""
        return self.products[self.product]

    @property
    def loses(self) -> bool:
        """True if NMLinear is slower than the dense layer."""
        return self.taken > LOSES * self.dense

    @property
    def fits(self) -> bool:
        """True if no product is clearly faster than the one that NMLinear chooses."""
        return _nearly_fastest(self.product, self.products)

    def to_dict(self) -> dict[str, Any]:
        """The times as JSON types. The time of the product "dense" is called "unpacked"."""
        times = dict(self.products)
        known = {"packed": times.pop("packed", None), "unpacked": times.pop("dense")}
        known["semi_structured"] = times.pop("semi_structured", None)
        return {"rows": self.rows, "dense": self.dense, **known, "product": self.product, "others": times}


@dataclass(frozen=True)
class LayerTimes:
    """Times of one kind of layer on one device.

    Attributes:
        kind: the kind of layer.
        device: name of the device.
        dense_bytes, packed_bytes: size of one layer's weight, dense and packed.
        refusals: why a product could compute none of the calls, by name of the product.
        times: one entry per number of rows, in the given order.
    """

    kind: LayerKind
    device: str
    dense_bytes: int
    packed_bytes: int
    refusals: Mapping[str, str]
    times: tuple[RowTimes, ...]

    def to_dict(self) -> dict[str, Any]:
        """The times as JSON types."""
        return {
            **asdict(self),
            "kind": self.kind.to_dict(),
            "why_no_semi_structured": self.refusals.get("semi_structured"),
            "times": [entry.to_dict() for entry in self.times],
        }


def kinds_of(model: nn.Module) -> list[LayerKind]:
    """List the kinds of packed layers in a model, in order of first appearance."""
    counts = Counter(_kind_of(module) for module in model.modules() if isinstance(module, PackedLinear))
    return [dataclasses.replace(kind, count=count) for kind, count in counts.items()]


def _kind_of(layer: PackedLinear) -> LayerKind:
    shape = (layer.out_features, layer.in_features)
    if isinstance(layer, NMLinear):
        return LayerKind(shape, layer.n, layer.m, layer.dtype, bits=layer.bits, group=layer.group)
    if isinstance(layer, (QuantizedLinear, TiedLinear)):
        return LayerKind(shape, None, None, layer.dtype, bits=layer.bits, group=layer.group)
    kept = round(layer.values.numel() / max(1, shape[0] * shape[1]), 2)
    return LayerKind(shape, None, None, layer.dtype, kept=kept)


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
    timed: dict[str, Product] = {}
    refusals: dict[str, str] = {}
    for product in registry.products:
        why_not = [product.why_not(weights[0], count) for count in rows]
        if None in why_not:
            timed[product.name] = product
        else:
            refusals[product.name] = str(why_not[0])
    calls = _calls(weights, tuple(timed.values()), rows)
    times: list[RowTimes] = []
    for done, count in enumerate(rows, 1):
        generator = torch.Generator().manual_seed(count)
        tokens = torch.randn(count, kind.shape[1], generator=generator, dtype=torch.float32, device="cpu")
        able = [name for name, product in timed.items() if product.why_not(weights[0], count) is None]
        run = {name: calls[name] for name in (DENSE_LAYER, *able)}
        medians = _medians(run, len(weights), tokens.to(device, kind.dtype), seconds)
        dense = medians.pop(DENSE_LAYER)
        chosen = choose_product(count, weights[0], limits)
        taken = {DENSE_COPY: dense} if chosen == DENSE_COPY else {}
        times.append(RowTimes(count, dense, {**medians, **taken}, chosen))
        if progress is not None:
            progress(done, len(rows))
    return LayerTimes(kind, _name_of(device), weights[0].dense_bytes, weights[0].packed_bytes, refusals, tuple(times))


def _name_of(device: torch.device) -> str:
    """The GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'' if threads == 1 else 's'}"


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

    @property
    def loses(self) -> bool:
        """True if NMLinear is slower than the dense layers, all together."""
        return self.taken > LOSES * self.dense


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
    by_rows = [fastest(entry.products) for entry in ordered]
    others = []
    for name, run in itertools.groupby(range(len(ordered)), key=lambda index: by_rows[index]):
        places = list(run)
        if name in registry.others:
            last = None if places[-1] == len(ordered) - 1 else ordered[places[-1]].rows
            others.append((name, ordered[places[0]].rows, last))
    at = {entry.rows: entry.products for entry in ordered}
    rest = [(entry.rows, name) for entry, name in zip(ordered, by_rows, strict=True) if name not in registry.others]
    packed = 0
    for rows, name in rest:
        if name != "packed" and not _nearly_fastest("packed", at[rows]):
            break
        packed = rows
    wins = [rows for rows, name in rest if name == "semi_structured"]
    return RowLimits(packed, min(wins) if wins else None, others=tuple(others))


def _nearly_fastest(name: str, times: Mapping[str, float]) -> bool:
    """True if a product is within the noise of timing of the fastest one."""
    return name in times and times[name] <= LOSES * min(times.values())


def fastest(times: Mapping[str, float]) -> str:
    """Name of the fastest product. Of equally fast ones, "packed" precedes "dense", and both precede the others."""
    order = ("packed", "dense")
    return min(times, key=lambda name: (times[name], order.index(name) if name in order else len(order)))


def _weights(kind: LayerKind, device: torch.device) -> list[Packed]:
    """Make copies of one packed weight, COLD_BYTES in total."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(kind.shape, generator=generator, dtype=torch.float32, device="cpu").to(device, kind.dtype)
    if kind.n is None and kind.bits is not None:
        first: Packed = quantize_dense(dense, kind.bits, kind.group)
    elif kind.n is None or kind.m is None:
        kept = torch.rand(kind.shape, generator=generator, dtype=torch.float32, device="cpu") < (kind.kept or 0)
        first = pack_rows(dense * kept.to(device))
    else:
        first = pack_nm(select_nm(dense, ScoreTerms(), kind.n, kind.m), kind.n, kind.m)
        if kind.bits is not None:
            first = quantize_nm(first, kind.bits, kind.group)
    copies = min(MOST_ROUNDS, max(2, -(-COLD_BYTES // max(1, first.packed_bytes))))
    parts = first.tensors.items()
    return [first.with_tensors({name: tensor.clone() for name, tensor in parts}) for _ in range(copies)]


def _calls(weights: Sequence[Packed], products: Sequence[Product], rows: Sequence[int]) -> dict[str, Call]:
    """What to time, by name of the product. Each takes tokens and the index of a copy of the weight.

    In one round the products read different copies, so that none finds its weight in a cache.
    """
    dense = [unpacked_weight(weight) for weight in weights]
    calls: dict[str, Call] = {DENSE_LAYER: lambda tokens, copy: nn.functional.linear(tokens, dense[copy])}
    limits = RowLimits(packed=0, semi_structured=0, second_copy=True)
    for place, product in enumerate(products):
        shift = place * len(weights) // len(products)
        calls[product.name] = _call(product, [*weights[shift:], *weights[:shift]], limits)
        if product.converts:
            least = min(count for count in rows if product.why_not(weights[0], count) is None)
            tokens = weights[0].values.new_zeros(least, weights[0].shape[1], dtype=weights[0].dtype)
            for weight in weights:
                product.multiply(tokens, weight, None, limits)
    return calls


def _call(product: Product, weights: Sequence[Packed], limits: RowLimits) -> Call:
    return lambda tokens, copy: product.multiply(tokens, weights[copy], None, limits)


@torch.inference_mode()
def _medians(calls: Mapping[str, Call], copies: int, tokens: torch.Tensor, seconds: float) -> dict[str, float]:
    """Median milliseconds of each call."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(tokens, -1)
    started = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        if turn >= FEWEST_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name, call in calls.items():
            spent[name].append(_milliseconds(call, tokens, turn % copies))
    return {name: statistics.median(found) for name, found in spent.items()}


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
