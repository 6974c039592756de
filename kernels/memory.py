"""Checks tensors and takes their addresses for the compiled library; no other module does.

The library does not check the memory behind an address. So before its address is taken, a tensor must own memory on the
CPU and have the dtype, shape and layout that the C++ code expects. New tensors get an explicit dtype and device,
independent of torch's defaults. An address is valid only while its tensor is alive, so a copy made for a call must be
kept in a variable.
"""

from __future__ import annotations

import torch

from .cpu_library import call
from .errors import ArgumentError

ELEMENTS = {torch.float32: (0, 4), torch.float16: (1, 2), torch.bfloat16: (2, 2)}
"""For each dtype of weights and tokens: its number in the library, and bytes per element."""

LARGE_BYTES = 16 * 2**20
"""Outputs of this size or more are most likely new memory from the system, not reused by the allocator."""

_TENSOR = torch.Tensor
_PLAIN = (torch.Tensor, torch.nn.Parameter)

_DTYPES = "in float32, float16 or bfloat16 (convert others with .float())"

# Templates for new tensors: faster than torch.empty with dtype and device, and equally independent of torch's defaults.
_EMPTY = {
    dtype: torch.empty(0, dtype=dtype, device="cpu")
    for dtype in (*ELEMENTS, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
}

# Tensor subclasses whose numbers are stored elsewhere define their own __torch_dispatch__.
_NO_DISPATCH = torch.Tensor.__torch_dispatch__

_REMEDIES = {
    "DTensor": "sharded by FSDP2 or tensor parallelism: gather it first, with tensor.full_tensor() or module.unshard()",
    "FakeTensor": "which has no data: create the tensors outside of FakeTensorMode",
    "MaskedTensor": "whose mask kernels do not support: pass .to_tensor(value)",
}

Region = tuple[int, int, int, int, int]
"""The library's arguments for a matrix: address, rows, columns, row stride in elements, and the dtype's number."""


def why_no_memory(tensor: torch.Tensor) -> str | None:
    """Why kernels cannot access the memory of ``tensor``, as the end of a sentence about it; None if they can."""
    if (why := why_not_plain(tensor)) is not None:
        return why
    if tensor.layout is not torch.strided:
        return f"is sparse ({tensor.layout}): call .to_dense() first"
    if tensor.is_meta:
        return "is on the meta device and has no data: load it first"
    if tensor.is_neg():
        return "is a lazily negated view: call .resolve_neg() first"
    try:
        inside = _lies_inside(tensor)
    except RuntimeError:
        return "is wrapped by a transform (torch.func, vmap), which hides its memory: call this outside of it"
    return None if inside else "has no memory (freed by FSDP, or offloaded): load or gather it first"


def _lies_inside(tensor: torch.Tensor) -> bool:
    """Whether all numbers lie in the memory that the tensor's storage still has."""
    place, storage = tensor.data_ptr(), tensor.untyped_storage()
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    end = place + extent * tensor.element_size()
    return not tensor.numel() or (place != 0 and end <= storage.data_ptr() + storage.nbytes())


def why_not_plain(tensor: torch.Tensor) -> str | None:
    """As :func:`why_no_memory`, but checks only the tensor's class, which costs nothing on any device."""
    kind = type(tensor)
    if kind in _PLAIN or kind.__torch_dispatch__ is _NO_DISPATCH:
        return None
    remedy = _REMEDIES.get(kind.__name__, "whose data is stored elsewhere: convert it to a plain torch.Tensor first")
    return f"is a {kind.__name__}, {remedy}"


def overlaps(matrix: torch.Tensor) -> bool:
    """True if two elements of a matrix share memory, as in an expanded tensor."""
    (least, n_least), (most, n_most) = sorted(zip(matrix.stride(), matrix.shape, strict=True))
    return (n_least > 1 and least < 1) or (n_most > 1 and most <= least * (n_least - 1))


def new(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """An uninitialized CPU tensor and its address; large tensors use huge pages if the system allows it."""
    made = _EMPTY[dtype].new_empty(*shape)
    try:
        place = made.data_ptr() if type(made) is _TENSOR else 0
    except RuntimeError:
        place = 0
    if not place and made.numel():
        raise ArgumentError(f"a new tensor {why_no_memory(made)}")
    if made.nbytes >= LARGE_BYTES:
        call("ace_prefer_huge_pages", place, made.nbytes)
    return made, place


def address(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], what: str) -> int:
    """The address of a contiguous CPU tensor with this dtype and shape.

    Raises:
        ArgumentError: if dtype, shape, layout or device is wrong, or if the tensor has no memory. ``what`` names the
            tensor in the message.
    """
    try:
        if (
            tensor.dtype is dtype
            and tensor.shape == shape
            and tensor.is_cpu
            and (type(tensor) in _PLAIN or why_not_plain(tensor) is None)
            and tensor.is_contiguous()
            and not tensor.is_neg()
        ):
            place = tensor.data_ptr()
            storage = tensor.untyped_storage()
            if place and place + tensor.nbytes <= storage.data_ptr() + storage.nbytes():
                return place
            if not tensor.numel():
                return 0
    except RuntimeError:  # from torch, if the tensor has no memory
        pass
    raise ArgumentError(_why_invalid(tensor, f"contiguous {dtype} {tuple(shape)}", what))


def device_address(tensor: torch.Tensor) -> int:
    """The address of a tensor on any device, for a table that a Triton kernel reads.

    :meth:`~ace_triton.kernels.op.Op.on` has checked the tensor. The caller keeps it until the kernel was launched.
    """
    return tensor.data_ptr()


def elements(tensor: torch.Tensor, shape: torch.Size, what: str) -> tuple[int, int]:
    """:func:`address` of a tensor whose dtype is one of ELEMENTS, and the dtype's number."""
    dtype = tensor.dtype if tensor.dtype in ELEMENTS else torch.float32
    return address(tensor, dtype, shape, what), ELEMENTS[dtype][0]


def matrix(tensor: torch.Tensor, what: str, *, written: bool = False) -> tuple[torch.Tensor, Region]:
    """The tensor, or a copy of it with contiguous rows, and the library's arguments for it.

    Args:
        tensor: a matrix; its dtype is one of ELEMENTS.
        what: name of the tensor in error messages.
        written: True if the library writes to the matrix; its elements must not overlap then. If a copy is returned,
            the caller copies the result back.

    Raises:
        ArgumentError: as :func:`address`.
    """
    dtype = tensor.dtype
    try:
        if dtype in ELEMENTS and (type(tensor) in _PLAIN or why_not_plain(tensor) is None) and tensor.is_cpu:
            rows, cols = tensor.shape
            stride, step = tensor.stride()
            if (step != 1 and cols > 1) or (written and stride < cols and rows > 1) or tensor.is_neg():
                if (written and overlaps(tensor)) or not _lies_inside(tensor):
                    raise ValueError
                tensor, stride = tensor.detach().resolve_neg().contiguous(), cols
            element, size = ELEMENTS[dtype]
            place = tensor.data_ptr()
            storage = tensor.untyped_storage()
            if place and place + ((rows - 1) * stride + cols) * size <= storage.data_ptr() + storage.nbytes():
                return tensor, (place, rows, cols, stride, element)
            if not rows * cols:
                return tensor, (0, rows, cols, stride, element)
    except (RuntimeError, ValueError):  # from torch, if it has no memory; from Python, if it is not two-dimensional
        pass
    expected = f"[rows, columns] {_DTYPES}" + (", without overlapping elements" if written else "")
    raise ArgumentError(_why_invalid(tensor, expected, what))


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself if it is contiguous and not lazily negated, or has no memory; else a contiguous copy."""
    if (tensor.is_contiguous() and not tensor.is_neg()) or not _lies_inside(tensor):
        return tensor
    return tensor.detach().resolve_neg().contiguous()


def sequences(tensor: torch.Tensor, what: str) -> tuple[torch.Tensor, tuple[int, int, int, int, int, int, int]]:
    """As :func:`matrix`, for a tensor [n_sequences, length, columns].

    The library's arguments are address, the three sizes, the strides of the first two dimensions, and the dtype's
    number.
    """
    dtype = tensor.dtype
    try:
        if dtype in ELEMENTS and (type(tensor) in _PLAIN or why_not_plain(tensor) is None) and tensor.is_cpu:
            number, length, cols = tensor.shape
            outer, inner, step = tensor.stride()
            if (step != 1 and cols > 1) or tensor.is_neg():
                if not _lies_inside(tensor):
                    raise ValueError
                tensor = tensor.detach().resolve_neg().contiguous()
                outer, inner, _ = tensor.stride()
            element, size = ELEMENTS[dtype]
            place = tensor.data_ptr()
            storage = tensor.untyped_storage()
            end = place + ((number - 1) * outer + (length - 1) * inner + cols) * size
            if (place and end <= storage.data_ptr() + storage.nbytes()) or not number * length * cols:
                return tensor, (place, number, length, cols, outer, inner, element)
    except (RuntimeError, ValueError):  # as in matrix
        pass
    raise ArgumentError(_why_invalid(tensor, f"[n_sequences, length, columns] {_DTYPES}", what))


def _why_invalid(tensor: torch.Tensor, expected: str, what: str) -> str:
    """The error message for a tensor that the library cannot use."""
    if (why := why_no_memory(tensor)) is not None:
        return f"{what} {why}"
    if not tensor.is_cpu:
        return f"{what} is on {tensor.device}, but the compiled library needs CPU tensors: move it with .cpu()"
    return f"{what} must be {expected}; got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
