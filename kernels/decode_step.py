"""decode_step: a token of each of several texts through a whole decoder, in one call of the compiled CPU library.

    a = h + O attention(norm h),   h' = a + D (activation(G norm a) * U norm a),   logits = H norm h'

Norms are RMS norms, positions are rotary, and attention reads keys and values of earlier tokens from the cache of the
text. All sums are fp32. Bytes read per call: those of all weights, and 8 bytes for each position of each text, head of
keys, and number in a head. The logits of a text do not depend on the other texts, bit for bit. The products are those
of :mod:`~ace_triton.kernels.nm_linear`, :mod:`~ace_triton.kernels.rows_linear` and a loop over dense weights, with the
same results as a call of each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cpu_library import call, structure
from .errors import ArgumentError
from .memory import ELEMENTS, address, contiguous, matrix, new
from .packed_dense import PackedDense
from .packed_nm import PackedNM
from .packed_rows import PackedRows

LANES = 16
"""Positions whose keys lie side by side in the cache."""

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
"""Activations of a gate: the last one approximates gelu by tanh."""

_DENSE, _PACKED, _FEW_BITS = range(3)
_FLOAT = torch.float32


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        weight: [out, in], dense, packed or quantized.
        bias: [out] or None.
    """

    weight: torch.Tensor | PackedNM | PackedRows | PackedDense
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Block:
    """A block of a decoder.

    Attributes:
        attention_norm, feed_norm: weights of the norms before attention and before the feed-forward layers.
        inputs: layers that give queries, keys and values, in this order: three, or one for all.
        output: the layer behind attention.
        gates: layers that give the gates and what they multiply, in this order: two, or one for both.
        down: the layer behind the gates.
        query_norm, key_norm: weights of norms of each head, before positions; None if there are none.
    """

    attention_norm: torch.Tensor
    feed_norm: torch.Tensor
    inputs: Sequence[Linear]
    output: Linear
    gates: Sequence[Linear]
    down: Linear
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None


@dataclass(frozen=True)
class Sizes:
    """Sizes and constants that all blocks share.

    Attributes:
        hidden: numbers of a token between blocks.
        heads, kv_heads: heads of queries, and of keys and values.
        head_size: numbers of a head.
        rotary: numbers of a head that positions rotate, from the first on.
        intermediate: number of gates.
        eps: added to the mean square in every norm.
        scaling: factor of the scores.
        activation: one of :data:`ACTIVATIONS`.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    rotary: int
    intermediate: int
    eps: float
    scaling: float
    activation: str


class DecodeCache:
    """Keys and values of one text; :meth:`DecodeStep.cache` makes it.

    Attributes:
        shape: number of blocks, and the sizes of the decoder.
        capacity: largest number of tokens.
        length: number of tokens in the cache.
    """

    def __init__(self, blocks: int, sizes: Sizes, cosines: torch.Tensor, sines: torch.Tensor) -> None:
        self.shape = blocks, sizes
        self.length = 0
        self._allocate(cosines, sines)

    @property
    def described(self) -> ctypes.Structure:
        """The cache as the library takes it."""
        self._cache.position = self.length
        return self._cache

    def grow(self, cosines: torch.Tensor, sines: torch.Tensor) -> None:
        """Make room for more tokens; those in the cache stay.

        Args:
            cosines, sines: of all positions, [capacity, rotary size].

        Raises:
            ArgumentError: if the shapes do not fit.
        """
        if len(cosines) < self.capacity:
            raise ArgumentError(f"the cache has room for {self.capacity} tokens and cannot shrink to {len(cosines)}")
        keys, values = self._keys, self._values
        self._allocate(cosines, sines)
        self._keys[:, :, : keys.shape[2]] = keys
        self._values[:, :, : values.shape[2]] = values

    def fill(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Put the first tokens into an empty cache.

        Args:
            keys, values: for each block, [kv_heads, n_tokens, head_size].

        Raises:
            ArgumentError: if the shapes do not fit.
        """
        _, sizes = self.shape
        heads, length, size = keys[0].shape
        expected = (sizes.kv_heads, length, sizes.head_size)
        if any(tensor.shape != expected for tensor in (*keys, *values)) or not 0 < length <= self.capacity:
            raise ArgumentError(f"keys and values must be {expected} with at most {self.capacity} tokens")
        whole = -(-length // LANES) * LANES
        for k in range(len(self._keys)):
            padded = torch.nn.functional.pad(keys[k].float(), (0, 0, 0, whole - length))
            blocks = padded.view(heads, whole // LANES, LANES, size).transpose(-1, -2)
            self._keys[k].view(heads, -1, size, LANES)[:, : whole // LANES] = blocks
            self._values[k, :, :length] = values[k]
        self.length = length

    def _allocate(self, cosines: torch.Tensor, sines: torch.Tensor) -> None:
        """A new cache with room for one token at each of these positions."""
        blocks, sizes = self.shape
        self.capacity = len(cosines)
        room = -(-self.capacity // LANES) * LANES
        shape = (blocks, sizes.kv_heads, room, sizes.head_size)
        self._keys, keys_at = new(shape, _FLOAT)
        self._values, values_at = new(shape, _FLOAT)
        self._positions = tuple(_in_fp32(table) for table in (cosines, sines))
        expected = (self.capacity, sizes.rotary)
        cosines_at, sines_at = (address(table, _FLOAT, expected, "cosines and sines") for table in self._positions)
        self._cache = structure("AceCache")(
            keys=keys_at, values=values_at, cosines=cosines_at, sines=sines_at, capacity=room
        )


class DecodeStep:
    """A decoder that computes one token of each of several texts at a time.

    It reads the weights where they are. So they must not move while it is used; biases and norms that are not fp32 are
    copied.

    Args:
        blocks, norm, head: the weights; ``norm`` is that of the last norm.
        sizes: what all blocks share.

    Attributes:
        seconds: time of the products, of attention and of everything, in the last step.

    Raises:
        ArgumentError: if a tensor does not fit, or is not on the CPU in a dtype that the library supports.
        BackendError: if the library is not available.
    """

    def __init__(self, blocks: Sequence[Block], norm: torch.Tensor, head: Linear, sizes: Sizes) -> None:
        self._kept: list[Any] = []
        self._sizes = sizes
        if sizes.rotary % 2 or sizes.rotary > sizes.head_size or sizes.heads % sizes.kv_heads:
            raise ArgumentError(f"{sizes.rotary} rotary numbers do not fit heads of {sizes}")
        self._blocks = (structure("AceBlock") * len(blocks))(*map(self._block, blocks))
        self._vocabulary = _shape(head)[0]
        self._logits, self._logits_at = new((1, self._vocabulary), _FLOAT)
        self._decoder = structure("AceDecoder")(
            blocks=ctypes.addressof(self._blocks),
            head=self._products([head], sizes.hidden),
            norm=self._vector(norm, sizes.hidden, "norm"),
            n_blocks=len(blocks),
            hidden=sizes.hidden,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_size=sizes.head_size,
            rotary_size=sizes.rotary,
            intermediate=sizes.intermediate,
            eps=sizes.eps,
            scaling=sizes.scaling,
            activation=ACTIVATIONS[sizes.activation],
        )
        self._seconds = (ctypes.c_double * 3)()

    @property
    def seconds(self) -> tuple[float, float, float]:
        products, attention, everything = self._seconds
        return products, attention, everything

    def cache(self, cosines: torch.Tensor, sines: torch.Tensor) -> DecodeCache:
        """An empty cache for one text.

        Args:
            cosines, sines: those of the rotary positions, [capacity, rotary size].

        Raises:
            ArgumentError: if the shapes do not fit.
        """
        return DecodeCache(len(self._blocks), self._sizes, cosines, sines)

    def __call__(self, caches: Sequence[DecodeCache], hidden: torch.Tensor) -> torch.Tensor:
        """Add one token to each cache. The results are the same as with one call for each text.

        Args:
            caches: of different texts, at least one.
            hidden: fp32 [n_texts, hidden], the tokens' embeddings.

        Returns:
            The logits of the next tokens, fp32 [n_texts, vocabulary]. The next call overwrites them.

        Raises:
            ArgumentError: if a cache is full, there twice, or of another decoder.
        """
        count = len(caches)
        if not count or len({id(cache) for cache in caches}) != count:
            raise ArgumentError("a step takes one cache of each text, and at least one text")
        for cache in caches:
            if cache.shape != (len(self._blocks), self._sizes):
                raise ArgumentError("a cache is of another decoder: make it with cache()")
            if cache.length >= cache.capacity:
                raise ArgumentError(f"the cache is full: it has room for {cache.capacity} tokens")
        given = address(hidden, _FLOAT, (count, self._sizes.hidden), "hidden")
        if len(self._logits) < count:
            self._logits, self._logits_at = new((count, self._vocabulary), _FLOAT)
        texts = (structure("AceCache") * count)(*(cache.described for cache in caches))
        threads = torch.get_num_threads()
        call(
            "ace_decode_step",
            ctypes.byref(self._decoder),
            texts,
            count,
            given,
            self._logits_at,
            self._seconds,
            threads,
        )
        for cache in caches:
            cache.length += 1
        return self._logits[:count]

    def _block(self, block: Block) -> ctypes.Structure:
        sizes = self._sizes
        size, hidden = sizes.head_size, sizes.hidden
        joined = (sizes.heads + 2 * sizes.kv_heads) * size
        for layers, outputs in ((block.inputs, joined), (block.gates, 2 * sizes.intermediate)):
            if (given := sum(_shape(layer)[0] for layer in layers)) != outputs:
                raise ArgumentError(f"layers that read the same token must have {outputs} outputs, got {given}")
        if not _shape(block.output)[0] == _shape(block.down)[0] == hidden:
            raise ArgumentError(f"layers at the end of a block must have {hidden} outputs")
        return structure("AceBlock")(
            attention_norm=self._vector(block.attention_norm, hidden, "attention norm"),
            feed_norm=self._vector(block.feed_norm, hidden, "feed-forward norm"),
            query_norm=None if block.query_norm is None else self._vector(block.query_norm, size, "query norm"),
            key_norm=None if block.key_norm is None else self._vector(block.key_norm, size, "key norm"),
            inputs=self._products(block.inputs, hidden),
            output=self._products([block.output], sizes.heads * size),
            gates=self._products(block.gates, hidden),
            down=self._products([block.down], sizes.intermediate),
            n_inputs=len(block.inputs),
            n_gates=len(block.gates),
        )

    def _products(self, layers: Sequence[Linear], inputs: int) -> int:
        """The address of the products of some layers."""
        for layer in layers:
            if _shape(layer)[1] != inputs:
                raise ArgumentError(f"a layer must have {inputs} inputs, got {_shape(layer)[1]}")
        return self._array("AceProduct", [self._product(layer) for layer in layers])

    def _product(self, layer: Linear) -> ctypes.Structure:
        rows, cols = _shape(layer)
        bias = None if layer.bias is None else self._vector(layer.bias, rows, "bias")
        made = structure("AceProduct")
        weight = layer.weight
        if isinstance(weight, torch.Tensor):
            owner, (place, _, _, stride, element) = matrix(weight.detach(), "weight")
            self._kept.append(owner)
            return made(kind=_DENSE, element=element, rows=rows, cols=cols, stride=stride, values=place, bias=bias)
        weight.check_tensors()
        self._kept.append(weight)
        places = {name: address(tensor, tensor.dtype, tensor.shape, name) for name, tensor in weight.tensors.items()}
        if weight.dtype not in ELEMENTS:
            raise ArgumentError(f"a packed weight must be float32, float16 or bfloat16, got {weight.dtype}")
        shared = {"rows": rows, "cols": cols, "element": ELEMENTS[weight.dtype][0], "bias": bias, **places}
        if isinstance(weight, PackedRows):
            return made(kind=_PACKED, n_values=weight.values.numel(), **shared)
        pattern = {"n": weight.n, "m": weight.m}
        if weight.absmax is None:
            return made(kind=_PACKED, n_values=weight.values.numel(), **pattern, **shared)
        return made(kind=_FEW_BITS, bits=weight.bits, group=weight.group, **pattern, **shared)

    def _vector(self, tensor: torch.Tensor, shape: int | tuple[int, ...], what: str) -> int:
        """The address of a tensor, or of its copy in fp32."""
        owner = _in_fp32(tensor)
        self._kept.append(owner)
        return address(owner, _FLOAT, (shape,) if isinstance(shape, int) else shape, what)

    def _array(self, name: str, entries: Sequence[ctypes.Structure]) -> int:
        """The address of structures, one after the other."""
        made = (structure(name) * len(entries))(*entries)
        self._kept.append(made)
        return ctypes.addressof(made)


def _in_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor in fp32; the same one if it is that already."""
    return contiguous(tensor.detach() if tensor.dtype is _FLOAT else tensor.detach().float())


def _shape(layer: Linear) -> tuple[int, int]:
    rows, cols = layer.weight.shape
    return rows, cols
