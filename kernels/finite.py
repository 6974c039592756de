"""all_finite: checks in one read that all elements are finite, and that all score terms are 0 or more.

One launch checks up to two tensors. A :class:`~ace_triton.kernels.finite_check.FiniteCheck` records what was checked,
so that nothing is checked twice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch

from . import cpu, launch
from .finite_check import FiniteCheck
from .op import Op, Work, bytes_of, launch_metadata
from .triton_import import tl, triton

LAST_MARK = 2**31 - 1

FLAGS_AT_ONCE = 16384
"""Number of flags that are cleared in one launch."""

FLAG_STRIDE = 4
"""Elements from one flag to the next, so that all are aligned alike and a kernel compiles once."""


def all_finite(*tensors: torch.Tensor, terms: Iterable[torch.Tensor] = (), known: FiniteCheck | None = None) -> bool:
    """True if no tensor contains NaN or infinity, and no score term contains NaN, infinity or a negative number.

    The host reads the result, so a GPU call synchronizes and cannot be captured in a CUDA graph.

    Args:
        tensors: any shapes; fp32, fp16 or bf16; all on one device.
        terms: score terms, fp32, on that device.
        known: what was checked before. Only the other tensors are read, and recorded here if all are in range.
    """
    terms = list(terms)
    if known is None:
        return ALL_FINITE.on(*tensors, *terms)(tensors, terms)
    unknown: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for tensor, is_term in [*((tensor, False) for tensor in tensors), *((term, True) for term in terms)]:
        passed = known.passed(tensor, is_term=is_term)
        if passed is False:
            return False
        if passed is None:
            unknown[is_term].append(tensor)
    if any(unknown.values()) and not all_finite(*unknown[False], terms=unknown[True]):
        return False
    known.record(*unknown[False], terms=unknown[True])
    return True


def find_not_finite(
    *tensors: torch.Tensor, terms: Sequence[torch.Tensor] = (), also: torch.Tensor | None = None
) -> torch.Tensor:
    """A flag for the same check, which no host has read: int32 [1], 0 if all tensors are in range.

    Args:
        tensors, terms: as for :func:`all_finite`, at least one.
        also: a flag of an earlier check, int32 [1], that must be 0 too.
    """
    return FIND_NOT_FINITE.on(*tensors, *terms, also)(tensors, terms, also)


def new_flag(device: torch.device) -> torch.Tensor:
    """A flag, int32 [1], that is 0 and that nobody else uses. Many are cleared in one launch."""
    return _cleared.next(device)


def all_finite_reference(*tensors: torch.Tensor, terms: Sequence[torch.Tensor] = ()) -> bool:
    """The same check in plain torch."""
    finite = all(bool(tensor.detach().isfinite().all()) for tensor in (*tensors, *terms))
    return finite and all(bool((term.detach() >= 0).all()) for term in terms)


def not_finite_reference(*vectors: torch.Tensor) -> torch.Tensor:
    """A flag, int32 [1]: 1 if a vector contains NaN, infinity or a negative number, else 0."""
    whole = torch.cat(vectors)
    return (whole.isfinite() & (whole >= 0)).all().logical_not().int().reshape(1)


def _by_reference(tensors: Sequence[torch.Tensor], terms: Sequence[torch.Tensor]) -> bool:
    return all_finite_reference(*tensors, terms=terms)


def _all_finite_cpu(tensors: Sequence[torch.Tensor], terms: Sequence[torch.Tensor]) -> bool:
    return all(map(cpu.all_finite, tensors)) and all(cpu.all_finite(term, not_below_zero=True) for term in terms)


def _launched(tensors: Sequence[torch.Tensor], terms: Sequence[torch.Tensor]) -> bool:
    return _all_finite_triton([tensor.detach().contiguous() for tensor in (*tensors, *terms)], len(tensors))


def _all_finite_triton(tensors: Sequence[torch.Tensor], n_signed: int) -> bool:
    """The check for contiguous tensors; those from index ``n_signed`` on are score terms."""
    found, mark = _flags.next(tensors[0].device)
    _launch_checks(tensors, n_signed, found, mark)
    return found.item() != mark


def _find_triton(
    tensors: Sequence[torch.Tensor], terms: Sequence[torch.Tensor], also: torch.Tensor | None
) -> torch.Tensor:
    every = [tensor.detach().contiguous() for tensor in (*tensors, *terms)]
    found = new_flag(every[0].device)
    _launch_checks(every, len(tensors), found, 1, also)
    return found


def _launch_checks(
    tensors: Sequence[torch.Tensor], n_signed: int, found: torch.Tensor, mark: int, also: torch.Tensor | None = None
) -> None:
    """Two tensors per launch; a kernel writes ``mark`` to ``found`` if it finds an invalid number."""
    there = [(tensor, place < n_signed) for place, tensor in enumerate(tensors) if tensor.numel()]
    for (first, signed), *second in (there[k : k + 2] for k in range(0, len(there), 2)):
        block = launch.all_finite(first)
        other, other_signed = second[0] if second else (None, True)
        blocks = triton.cdiv(first.numel(), block)
        further = 0 if other is None else triton.cdiv(other.numel(), block)
        _find_non_finite[(blocks + further,)](
            *(first, other, found, also, first.numel(), 0 if other is None else other.numel(), blocks, mark),
            SIGNED=signed,
            OTHER_SIGNED=other_signed,
            BLOCK=block,
            num_warps=launch.WARPS,
        )


def _work(tensors: Sequence[torch.Tensor], terms: Sequence[torch.Tensor], also: torch.Tensor | None = None) -> Work:
    return Work(bytes_of(*tensors, *terms))


def find_not_finite_reference(
    tensors: Sequence[torch.Tensor], terms: Sequence[torch.Tensor], also: torch.Tensor | None
) -> torch.Tensor:
    """The flag of :func:`find_not_finite`, computed with plain torch."""
    found = not_finite_reference(*(t.float().abs().flatten() for t in tensors), *(t.flatten() for t in terms))
    return found if also is None else found | (also != 0)


ALL_FINITE = Op("all_finite", _work, _by_reference, _all_finite_cpu, _launched)
FIND_NOT_FINITE = Op("find_not_finite", _work, find_not_finite_reference, triton=_find_triton)


class _Cleared(threading.local):
    """Cleared flags by device and stream, and the number of those that were handed out."""

    def __init__(self) -> None:
        self._flags: dict[tuple[torch.device, int], tuple[torch.Tensor, int]] = {}

    def next(self, device: torch.device) -> torch.Tensor:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        flags, used = self._flags.get((device, stream), (None, FLAGS_AT_ONCE))
        if flags is None or used == FLAGS_AT_ONCE:
            with torch.inference_mode(False):
                flags, used = torch.zeros(FLAGS_AT_ONCE * FLAG_STRIDE, dtype=torch.int32, device=device), 0
        self._flags[device, stream] = flags, used + 1
        return flags[used * FLAG_STRIDE : used * FLAG_STRIDE + 1]


_cleared = _Cleared()


class _Flags(threading.local):
    """A flag (int32 [1]) per device and thread, with a new mark for each call.

    A call compares the flag with its own mark. So it need not clear the flag first, and the results of other threads
    and of interrupted calls have no effect.
    """

    def __init__(self) -> None:
        self._found: dict[torch.device, torch.Tensor] = {}
        self._calls = 0

    def next(self, device: torch.device) -> tuple[torch.Tensor, int]:
        """The flag on ``device``, and the mark that a kernel writes if it finds an invalid number."""
        if device not in self._found:
            with torch.inference_mode(False):
                self._found[device] = torch.zeros(1, dtype=torch.int32, device=device)
        self._calls = self._calls % LAST_MARK + 1
        return self._found[device], self._calls


_flags = _Flags()


@triton.jit(do_not_specialize=["mark"], launch_metadata=launch_metadata)
def _find_non_finite(
    tensor_ptr,
    other_ptr,
    found_ptr,
    also_ptr,
    size,
    other_size,
    blocks,
    mark,
    SIGNED: tl.constexpr,
    OTHER_SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first ``blocks`` programs check the first tensor, the others check the second one."""
    block = tl.program_id(0)
    if also_ptr is not None:
        tl.store(found_ptr, mark, mask=(block == 0) & (tl.load(also_ptr) != 0))
    if other_ptr is None:  # noqa: SIM114 (decided when Triton compiles)
        check_block(tensor_ptr, found_ptr, mark, block, size, SIGNED, BLOCK)
    elif block < blocks:
        check_block(tensor_ptr, found_ptr, mark, block, size, SIGNED, BLOCK)
    else:
        check_block(other_ptr, found_ptr, mark, block - blocks, other_size, OTHER_SIGNED, BLOCK)


@triton.jit
def check_block(tensor_ptr, found_ptr, mark, block, size, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    offset = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(tensor_ptr + offset, mask=offset < size, other=0.0).to(tl.float32)
    note_not_finite(value, found_ptr, mark, SIGNED)


@triton.jit
def note_not_finite(vector, found_ptr, mark, SIGNED: tl.constexpr):
    """Write ``mark`` if an fp32 vector contains NaN or infinity or, unless it is ``SIGNED``, a negative number."""
    tl.store(found_ptr, mark, mask=not_finite(vector, SIGNED) == 1)


@triton.jit
def not_finite(vector, SIGNED: tl.constexpr):
    """1 if an fp32 vector contains NaN or infinity or, unless it is ``SIGNED``, a negative number; else 0."""
    if SIGNED:
        good = tl.abs(vector) < float("inf")
    else:
        good = (vector >= 0) & (vector < float("inf"))
    return 1 - tl.min(good.to(tl.int32), 0)
