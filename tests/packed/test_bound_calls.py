"""Packed layers whose launches are bound: a stub driver shows what reaches the GPU, and what the host does."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ace_triton import NMLinear, RowLimits, prune_linear
from ace_triton.kernels import backend
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.linear_call import _add_splits
from ace_triton.kernels.nm_linear import _few_bits_body, _two_of_four_body
from ace_triton.kernels.nm_linear_dot import _dot_body
from ace_triton.kernels.nm_linear_few_bits import _few_bits_dot_body
from ace_triton.kernels.nm_linear_mma import _mma_body, refusal
from ace_triton.kernels.nm_linear_mma_few_bits import few_bits_mma_body
from ace_triton.kernels.rows_linear import _rows_linear_body
from ace_triton.packed.packed_linear import PackedLinear
from ace_triton.packed.products import register_product, registry
from ace_triton.packed.quantized_embedding import QuantizedEmbedding
from ace_triton.packed.quantized_linear import QuantizedLinear, TiedLinear
from ace_triton.packed.rows_linear import RowsLinear
from ace_triton.packed.sparse_units import SparseUnits, asked_for, fragments
from tests.statistics.test_deferred import Reads

pytestmark = [
    pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the stub driver stands in for a GPU that is not there"),
]


KERNELS = (
    *(_two_of_four_body, _dot_body, _add_splits, _few_bits_body, _few_bits_dot_body),
    *(_rows_linear_body, _mma_body, few_bits_mma_body),
)


class Driver:
    """Stands in for CUDA's: it notes each launch, its grid and its arguments."""

    def __init__(self) -> None:
        self.launches: list[tuple[object, ...]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (object(), name, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 2**18},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            shown = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
            self.launches.append((function, x, y, z, stream, *shown))

        return run


@pytest.fixture(scope="module")
def stub():
    """Compiled kernels keep their driver, so there is one for all tests."""
    yield Driver()
    for kernel in KERNELS:
        kernel.device_caches.clear()


@pytest.fixture
def gpu(monkeypatch, stub):
    """A stub driver for tensors on the CPU."""
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    monkeypatch.setattr(driver, "_active", stub)
    stub.launches.clear()
    return stub


def packed_layer(bias: bool = True, form: str = "2:4") -> PackedLinear:
    torch.manual_seed(0)
    layer = nn.Linear(1024, 64, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backend.ENVIRONMENT_VARIABLE, "cpu")
        prune_linear(layer, None, "magnitude")
        return packed_as(form, layer).requires_grad_(False)


def packed_as(form: str, layer: nn.Linear) -> PackedLinear:
    """The layer as n:m, as n:m in few bits, dense in few bits, by a quantized embedding, or with row starts."""
    limits = RowLimits(32)
    kind, _, bits = form.partition(" in ")
    if kind == "2:4":
        return NMLinear.from_linear(layer, 2, 4, limits, bits=int(bits) if bits else None, group=128)
    if kind == "dense":
        return QuantizedLinear.from_linear(layer, int(bits), 128, limits)
    if kind == "tied":
        table = nn.Embedding.from_pretrained(layer.weight)
        return TiedLinear(QuantizedEmbedding.from_embedding(table, int(bits), 128), layer.bias, limits)
    return RowsLinear.from_linear(layer, limits)


@pytest.fixture
def through_jit(monkeypatch):
    """Counts launches that bind their arguments through Triton's JIT."""
    calls, run = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *a, **k: calls.append(kernel) or run(kernel, *a, **k))
    return calls


def memory_free(launch: tuple[object, ...], *tensors: torch.Tensor) -> list[object]:
    """A launch with tensors named, and other addresses left out."""
    names = {tensor.data_ptr(): name for name, tensor in enumerate(tensors)}
    return [names.get(a, "address") if isinstance(a, int) and a > 2**32 else a for a in launch]


@pytest.mark.parametrize(
    ("form", "rows", "launches"),
    [
        *(("2:4", 1, 1), ("2:4", 2, 1), ("2:4", 16, 2)),
        *(("2:4 in 8", 1, 1), ("2:4 in 4", 1, 1), ("2:4 in 8", 16, 2)),
        *(("dense in 8", 1, 1), ("dense in 4", 1, 1), ("dense in 8", 16, 2), ("tied in 8", 1, 1)),
        *(("rows", 1, 1), ("rows", 16, 1)),
    ],
)
def test_a_second_call_launches_the_same_without_the_jit(gpu, through_jit, form, rows, launches):
    layer = packed_layer(form=form)
    tokens = torch.randn(2, rows, 1024, dtype=torch.bfloat16)
    first = layer(tokens[0])
    assert len(gpu.launches) == len(through_jit) == launches
    reads = Reads()
    with reads:
        second = layer(tokens[1])
    assert len(gpu.launches) == 2 * launches
    assert len(through_jit) == launches
    assert reads.count == 0
    parts = *layer.packed.tensors.values(), layer.bias
    before = [memory_free(launch, tokens[0], first, *parts) for launch in gpu.launches[:launches]]
    after = [memory_free(launch, tokens[1], second, *parts) for launch in gpu.launches[launches:]]
    assert before == after
    assert 1 in before[-1], "the last kernel writes the outputs"
    named = {number for launch in before for number in launch}
    assert named >= set(range(2 + len(parts))), "the kernels read every part of the layer"
    assert second.shape == (rows, 64)
    assert second.dtype == torch.bfloat16


def test_tokens_of_any_dimension_and_other_shapes(gpu, through_jit):
    layer = packed_layer(bias=False)
    for _ in range(2):
        assert layer(torch.randn(1, 1, 1024, dtype=torch.bfloat16)).shape == (1, 1, 64)
        assert layer(torch.randn(2, 1024, dtype=torch.bfloat16)).shape == (2, 64)
    assert len(through_jit) == 2


@pytest.mark.parametrize(
    ("change", "launched"),
    [
        (lambda layer: setattr(layer, "values", layer.values.clone()), 1),
        (lambda layer: setattr(layer, "bias", None), 2),
        (lambda layer: setattr(layer, "limits", RowLimits(16)), 2),
    ],
    ids=["values", "bias", "limits"],
)
def test_a_changed_layer_uses_its_new_parts(gpu, through_jit, change, launched):
    layer, tokens = packed_layer(), torch.randn(1, 1024, dtype=torch.bfloat16)
    layer(tokens)
    layer(tokens)
    change(layer)
    for _ in range(2):
        layer(tokens)
        assert layer.values.data_ptr() in gpu.launches[-1]
    assert (None in gpu.launches[-1]) == (layer.bias is None)
    assert len(through_jit) == launched


class Operations(TorchDispatchMode):
    """Names the torch operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("form", "rows", "allocated"), [("2:4 in 4", 1, 1), ("dense in 8", 16, 2), ("rows", 16, 1)])
def test_a_repetition_allocates_outputs_and_partial_sums_only(gpu, form, rows, allocated):
    layer, tokens = packed_layer(form=form), torch.randn(rows, 1024, dtype=torch.bfloat16)
    layer(tokens)
    with Operations() as operations:
        layer(tokens)
    assert operations.names.count("empty") == allocated
    assert set(operations.names) <= {"empty", "view"}


@pytest.mark.parametrize(
    ("form", "name"), [("2:4 in 8", "absmax"), ("dense in 8", "values"), ("rows", "starts"), ("rows", "meta")]
)
def test_a_new_storage_is_read_without_the_jit(gpu, through_jit, form, name):
    layer, tokens = packed_layer(form=form), torch.randn(1, 1024, dtype=torch.bfloat16)
    layer(tokens)
    old = getattr(layer, name)
    setattr(layer, name, old.clone())
    layer(tokens)
    assert len(through_jit) == 1
    assert getattr(layer, name).data_ptr() in gpu.launches[-1]
    assert old.data_ptr() not in gpu.launches[-1]


def test_a_layer_with_another_number_of_values_is_bound_again(gpu, through_jit):
    layer, tokens = packed_layer(form="rows"), torch.randn(1, 1024, dtype=torch.bfloat16)
    layer(tokens)
    layer.values = torch.cat((layer.values, layer.values))
    for _ in range(2):
        layer(tokens)
        assert {layer.values.data_ptr(), len(layer.values)} <= set(gpu.launches[-1])
    assert len(through_jit) == 2


def test_a_call_by_unaligned_values_is_bound_once_they_are_aligned(gpu, through_jit):
    layer, tokens = packed_layer(form="2:4 in 8"), torch.randn(1, 1024, dtype=torch.bfloat16)
    aligned, shifted = layer.values, torch.empty(layer.values.numel() + 1, dtype=torch.int8)[1:].view(64, -1)
    layer.values = shifted.copy_(aligned)
    layer(tokens)
    layer(tokens)
    assert len(through_jit) == 2
    layer.values = aligned
    for _ in range(3):
        layer(tokens)
        assert aligned.data_ptr() in gpu.launches[-1]
    assert len(through_jit) == 3


@pytest.mark.parametrize("name", ["values", "bias"])
def test_a_part_whose_memory_was_freed_is_not_read(gpu, name):
    layer, tokens = packed_layer(form="2:4 in 8"), torch.randn(1, 1024, dtype=torch.bfloat16)
    layer(tokens)
    layer(tokens)
    getattr(layer, name).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no memory"):
        layer(tokens)
    assert len(gpu.launches) == 2


def test_bound_launches_keep_no_memory(gpu):
    layer, tokens = packed_layer(), torch.randn(1, 1024, dtype=torch.bfloat16)
    layer(tokens)
    layer(tokens)
    parts = [weakref.ref(layer.values), weakref.ref(layer.meta), weakref.ref(layer.bias), weakref.ref(tokens)]
    layer.values, layer.meta, layer.bias = layer.values.clone(), layer.meta.clone(), None
    del tokens
    gc.collect()
    assert [part() for part in parts] == [None] * 4


def test_calls_that_need_more_than_a_launch_go_the_long_way(gpu, through_jit):
    layer, tokens = packed_layer(), torch.randn(1, 1024, dtype=torch.bfloat16)
    layer(tokens)
    for other in (
        torch.randn(1, 2048, dtype=torch.bfloat16)[:, ::2],
        torch.randn(1025, dtype=torch.bfloat16)[1:][None],
        tokens.clone().requires_grad_(),
    ):
        before = len(through_jit)
        layer(other)
        assert len(through_jit) == before + 1
    with pytest.raises(ValueError, match="tokens must be"):
        layer(torch.randn(1, 1023, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="tokens must be"):
        layer(torch.randn(1, 1024))


def test_copies_start_without_bound_launches(gpu, through_jit):
    layer, tokens = packed_layer(), torch.randn(1, 1024, dtype=torch.bfloat16)
    layer(tokens)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        other(tokens)
        assert other.values.data_ptr() in gpu.launches[-1]


@pytest.mark.parametrize(
    ("form", "kernel"), [("2:4", _mma_body), ("2:4 in 8", few_bits_mma_body), ("2:4 in 4", few_bits_mma_body)]
)
def test_sparse_units_are_bound_too(gpu, through_jit, monkeypatch, form, kernel):
    """Repetitions take the repacked metadata of the weight as it is at the time of the call."""
    monkeypatch.setattr(SparseUnits, "refusal", lambda product, packed, rows: refusal(packed))
    monkeypatch.setattr(registry, "products", registry.products)
    monkeypatch.setattr(registry, "others", registry.others)
    if not asked_for():
        register_product(SparseUnits())
    layer = packed_layer(form=form)
    layer.limits = None
    parts = layer.values, layer.bias, *(() if layer.absmax is None else (layer.absmax,))
    tokens = torch.randn(3, 1, 1024, dtype=torch.bfloat16)
    first, second = layer(tokens[0]), layer(tokens[1])
    kept = fragments(layer.packed)
    assert through_jit == [kernel]
    before = memory_free(gpu.launches[0], tokens[0], first, kept, *parts)
    assert before == memory_free(gpu.launches[1], tokens[1], second, kept, *parts)
    assert set(range(3 + len(parts))) <= set(before)
    layer.meta.copy_(layer.meta.flip(0))
    third = layer(tokens[2])
    new = fragments(layer.packed)
    assert new is not kept
    assert before == memory_free(gpu.launches[2], tokens[2], third, new, *parts)
    assert len(through_jit) == 1
