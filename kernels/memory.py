"""The door to the compiled library: every address that leaves Python is checked and taken here.

The library reads and writes what it is told to. So a tensor must have memory of its own on the CPU, and the dtype,
shape and layout that its body walks, before its address is handed on; and every new tensor names its dtype and its
device, whatever torch's defaults are. An address is good as long as its tensor lives: a copy made for a call needs a
name.
"""

from __future__ import annotations

import torch

from .cpu_library import call
from .errors import ArgumentError

ELEMENTS = {torch.float32: (0, 4), torch.float16: (1, 2), torch.bfloat16: (2, 2)}
"""The dtypes of weights and tokens, as the library counts them, with their bytes."""

LARGE_BYTES = 16 * 2**20
"""From here on an output is most likely new memory rather than what the allocator kept."""

_TENSOR = torch.Tensor
_PLAIN = (torch.Tensor, torch.nn.Parameter)

_DTYPES = "in float32, float16 or bfloat16 (convert others with .float())"

# What new tensors are made like: quicker than naming dtype and device to torch.empty, and as independent of defaults.
_EMPTY = {
    dtype: torch.empty(0, dtype=dtype, device="cpu")
    for dtype in (*ELEMENTS, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
}

# Subclasses that stand for numbers kept elsewhere have a dispatcher of their own.
_NO_DISPATCH = torch.Tensor.__torch_dispatch__

_REMEDIES = {
    "DTensor": "sharded by FSDP2 or tensor parallelism: gather it first, with tensor.full_tensor() or module.unshard()",
    "FakeTensor": "which holds no numbers: leave FakeTensorMode, and make the tensors outside of it",
    "MaskedTensor": "whose mask no kernel knows: pass .to_tensor(value)",
}

Region = tuple[int, int, int, int, int]
"""Address, rows, columns, elements from row to row, and the dtype's number: how the library takes a matrix."""


def why_no_memory(tensor: torch.Tensor) -> str | None:
    """Why no kernel can work on ``tensor`` where it lies, as the end of a sentence about it; None if one can."""
    if (why := why_not_plain(tensor)) is not None:
        return why
    if tensor.layout is not torch.strided:
        return f"is sparse ({tensor.layout}): call .to_dense() first"
    if tensor.is_meta:
        return "is on the meta device and holds no numbers: load it first"
    if tensor.is_neg():
        return "is a view that negates when it is read: call .resolve_neg() first"
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
    """The same for the tensor's class alone, which is all that can be said of one on another device at no cost."""
    kind = type(tensor)
    if kind in _PLAIN or kind.__torch_dispatch__ is _NO_DISPATCH:
        return None
    remedy = _REMEDIES.get(kind.__name__, "whose numbers lie elsewhere: convert it to a plain torch.Tensor first")
    return f"is a {kind.__name__}, {remedy}"


def overlaps(matrix: torch.Tensor) -> bool:
    """Whether two numbers of a matrix share a place in memory, as those of an expanded one do."""
    (least, n_least), (most, n_most) = sorted(zip(matrix.stride(), matrix.shape, strict=True))
    return (n_least > 1 and least < 1) or (n_most > 1 and most <= least * (n_least - 1))


def new(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """A tensor on the CPU, not written yet, and its address; on huge pages if it is large enough to be new memory."""
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
    """The address of a contiguous tensor of that dtype and shape.

    Raises:
        ValueError: another dtype, shape, layout or device, or no memory; ``what`` names the tensor.
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
    except RuntimeError:  # of torch, for a tensor without memory
        pass
    raise ArgumentError(_refusal(tensor, f"contiguous {dtype} {tuple(shape)}", what))


def elements(tensor: torch.Tensor, shape: torch.Size, what: str) -> tuple[int, int]:
    """:func:`address` of a tensor of any of ELEMENTS, and its dtype's number."""
    dtype = tensor.dtype if tensor.dtype in ELEMENTS else torch.float32
    return address(tensor, dtype, shape, what), ELEMENTS[dtype][0]


def matrix(tensor: torch.Tensor, what: str, *, written: bool = False) -> tuple[torch.Tensor, Region]:
    """A matrix of any of ELEMENTS with contiguous rows: the tensor itself or, if it is laid out otherwise, a copy.

    Args:
        tensor: to be taken.
        what: names it in errors.
        written: the library will write to it, so its rows may not overlap. Whoever gets a copy writes it back.

    Raises:
        ValueError: as :func:`address`.
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
    except (RuntimeError, ValueError):  # of torch, for a tensor without memory; of Python, for one of other dimensions
        pass
    wanted = f"[rows, columns] {_DTYPES}"
    raise ArgumentError(_refusal(tensor, wanted + ", each number in a place of its own" if written else wanted, what))


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself if it is contiguous and not negated lazily, or has no memory; else a copy that is."""
    if (tensor.is_contiguous() and not tensor.is_neg()) or not _lies_inside(tensor):
        return tensor
    return tensor.detach().resolve_neg().contiguous()


def sequences(tensor: torch.Tensor, what: str) -> tuple[torch.Tensor, tuple[int, int, int, int, int, int, int]]:
    """The same of [n_sequences, length, columns]: address, the three sizes, the strides of the first two dimensions,
    and the dtype's number."""
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
    raise ArgumentError(_refusal(tensor, f"[n_sequences, length, columns] {_DTYPES}", what))


def _refusal(tensor: torch.Tensor, wanted: str, what: str) -> str:
    """What is wrong with a tensor that the library cannot take."""
    if (why := why_no_memory(tensor)) is not None:
        return f"{what} {why}"
    if not tensor.is_cpu:
        return f"{what} is on {tensor.device}, the compiled library works on the CPU: move it with .cpu()"
    return f"{what} must be {wanted}; got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
