import copy
import io
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ace_triton import NMLinear, PackedLinear, PackedWeightError, RowLimits, prune_linear
from ace_triton.kernels import cpu_library
from ace_triton.kernels.backend import ENVIRONMENT_VARIABLE, SlowBackendWarning, warn_of_slow_backend
from ace_triton.kernels.pack_nm import PatternError, pack_nm
from ace_triton.packed import dispatch, kernel, unpacked
from ace_triton.packed.dispatch import choose_product, copy_limits, default_limits, multiply
from ace_triton.packed.quantized_linear import QuantizedLinear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def pruned_linear(rows: int, cols: int, pattern: str = "2:4", dtype: torch.dtype = torch.float32, bias: bool = True):
    torch.manual_seed(0)
    layer = nn.Linear(cols, rows, bias=bias, dtype=dtype)
    prune_linear(layer, method="magnitude", sparsity=pattern)
    return layer


def packed_linear(layer: nn.Module, pattern: str = "2:4", **kwargs) -> NMLinear:
    return NMLinear.from_linear(layer, *map(int, pattern.split(":")), **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "5:16", "1:2", "17:32"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_the_dense_one(dtype, pattern, bias):
    layer = pruned_linear(23, 96, pattern, dtype, bias)
    packed = packed_linear(layer, pattern)
    weight, offset = layer.weight.double(), layer.bias.double() if bias else 0
    for shape in ((96,), (1, 96), (3, 5, 96), (2, 40, 96), (0, 96)):
        tokens = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            outputs = packed(tokens)
        assert outputs.dtype == dtype
        assert outputs.shape == (*shape[:-1], 23)
        torch.testing.assert_close(
            outputs.double(), tokens.double() @ weight.t() + offset, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("bias", [True, False])
def test_the_dense_product_a_block_of_outputs_at_a_time(monkeypatch, bias):
    layer = pruned_linear(23, 96, bias=bias)
    packed = packed_linear(layer, limits=RowLimits(0))
    tokens = torch.randn(7, 96)
    for block_rows in (1, 5, 22, 23, 100):
        monkeypatch.setattr(unpacked, "BLOCK_BYTES", block_rows * 96 * 4)
        with torch.no_grad():
            torch.testing.assert_close(packed(tokens), layer(tokens))


def test_it_holds_the_weight_once_and_gives_it_back():
    layer = pruned_linear(64, 128)
    packed = packed_linear(layer)
    assert torch.equal(packed.unpack(), layer.weight)
    assert (packed.in_features, packed.out_features) == (128, 64)
    assert packed.bias is layer.bias
    held = sum(tensor.nbytes for tensor in (*packed.buffers(), *packed.parameters())) - layer.bias.nbytes
    assert held == packed.packed.packed_bytes < 0.54 * layer.weight.nbytes
    assert "pattern=2:4" in repr(packed)


def test_gradients_flow_to_the_input_and_the_bias():
    layer = pruned_linear(24, 32)
    packed = packed_linear(copy.deepcopy(layer))
    tokens = torch.randn(2, 5, 32)
    gradients = []
    for module in (layer, packed):
        given = tokens.clone().requires_grad_()
        module(given).square().sum().backward()
        gradients.append((given.grad, module.bias.grad))
    torch.testing.assert_close(*gradients)
    assert [name for name, _ in packed.named_parameters()] == ["bias"]


@pytest.mark.parametrize("bits", [None, 4])
def test_the_operation_is_sound_for_autograd_and_the_compiler(bits):
    packed = NMLinear.from_linear(pruned_linear(24, 32), 2, 4, bits=bits, group=32)
    weight = (packed.values, packed.meta, packed.absmax, 2, 4, packed.group, 32)
    arguments = (packed.bias, *weight, None, None, False)
    tokens, gradient = torch.randn(3, 32, requires_grad=True), torch.randn(3, 24)
    parts = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    torch.library.opcheck(torch.ops.ace_triton.nm_linear.default, (tokens, *arguments), **parts)
    torch.library.opcheck(torch.ops.ace_triton.nm_linear_input_gradient.default, (gradient, *weight), **parts)


def test_it_compiles_in_one_graph_for_any_number_of_rows():
    layer = pruned_linear(24, 32)
    packed = packed_linear(layer)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (2, 7, 40):
        tokens = torch.randn(rows, 32, requires_grad=True)
        outputs = compiled(tokens)
        torch.testing.assert_close(outputs, layer(tokens))
        outputs.sum().backward()
        torch.testing.assert_close(tokens.grad, layer.weight.sum(0).expand(rows, -1))


def test_state_dicts_copies_and_pickles():
    layer = pruned_linear(24, 32)
    packed = packed_linear(layer)
    tokens = torch.randn(3, 32)
    expected = packed(tokens)
    assert set(packed.state_dict()) == {"values", "meta", "bias"}
    assert all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in packed.state_dict().values())
    other = packed_linear(pruned_linear(24, 32).requires_grad_(False))
    other.values.zero_()
    other.load_state_dict(packed.state_dict())
    twin = copy.deepcopy(packed)
    twin.values.zero_()
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for again in (other, torch.load(file, weights_only=False), copy.deepcopy(packed)):
        assert torch.equal(again(tokens), expected)
    empty = NMLinear.empty((24, 32), 2, 4, bias=True, dtype=torch.float32)
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(empty(tokens), expected)


def test_it_moves_and_converts_like_a_linear():
    packed = packed_linear(pruned_linear(24, 32))
    assert packed.to("meta")(torch.empty(3, 32, device="meta", requires_grad=True)).shape == (3, 24)
    for dtype in (torch.bfloat16, torch.float64):
        layer = pruned_linear(24, 32)
        converted = packed_linear(layer).to(dtype)
        assert converted.meta.dtype == torch.int32
        assert torch.equal(converted.unpack(), layer.weight.to(dtype))
        tokens = torch.randn(3, 32, dtype=dtype)
        torch.testing.assert_close(converted(tokens), layer.to(dtype)(tokens), rtol=3e-2, atol=3e-2)


def test_under_autocast_it_answers_in_autocast_s_dtype():
    layer = pruned_linear(24, 32)
    packed = packed_linear(layer)
    tokens = torch.randn(3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = packed(tokens)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), layer(tokens), rtol=1e-2, atol=1e-2)


def test_the_weight_can_be_looked_at_and_read_but_not_written():
    layer = pruned_linear(24, 32)
    packed = packed_linear(layer)
    weight = packed.weight
    assert (weight.shape, weight.dtype, weight.device) == ((24, 32), torch.float32, layer.weight.device)
    tokens = torch.randn(3, 32)
    assert torch.equal(weight.data.abs().sum(1), layer.weight.abs().sum(1))
    assert torch.equal(nn.functional.linear(tokens, weight), nn.functional.linear(tokens, layer.weight))
    assert weight[3].tolist() == layer.weight[3].tolist()
    assert (weight.numpy() == layer.weight.detach().numpy()).all()
    assert repr(weight[0]) == repr(layer.weight.detach()[0])
    assert torch.equal(torch.zeros(24, 32).add_(weight), layer.weight)
    assert not packed.weight.numpy().flags.writeable


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.add_(1),
        lambda weight: weight.__setitem__(0, 1),
        lambda weight: weight.view(-1).__setitem__(slice(3, 5), 1),
        lambda weight: weight.t()[2].zero_(),
        lambda weight: weight.chunk(2)[1].zero_(),
        lambda weight: setattr(weight, "data", torch.zeros(24, 32)),
        lambda weight: torch.add(weight, 1, out=weight),
        lambda weight: torch._foreach_mul_([weight], 2),
        lambda weight: nn.init.normal_(weight),
    ],
)
def test_writing_to_the_weight_is_refused_and_never_lost(write):
    packed = packed_linear(pruned_linear(24, 32))
    with pytest.raises(PackedWeightError, match="cannot be written to"):
        write(packed.weight)


def test_what_cannot_be_packed_is_refused_with_row_and_group():
    layer = pruned_linear(8, 16)
    with torch.no_grad():
        layer.weight[5, 8:11] = 1.0
    with pytest.raises(PatternError, match="row 5, group 2") as caught:
        packed_linear(layer)
    assert (caught.value.row, caught.value.group) == (5, 2)
    with pytest.raises(ValueError, match=r"only nn\.Linear and Conv1D can be packed"):
        packed_linear(nn.Embedding(4, 4))


def test_tokens_that_do_not_fit():
    packed = packed_linear(pruned_linear(8, 16))
    for tokens in (torch.randn(3, 8), torch.randn(3, 16).half()):
        with pytest.raises(ValueError, match=r"tokens must be \[..., 16\] torch.float32"), torch.no_grad():
            packed(tokens)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(0, 300), packed_rows=st.integers(0, 300), torchs=st.none() | st.integers(0, 300))
def test_the_product_is_picked_by_rows_and_any_pick_is_right(rows, packed_rows, torchs):
    layer = pruned_linear(8, 16)
    packed = packed_linear(layer).packed
    limits = RowLimits(packed_rows, torchs)
    product = choose_product(rows, packed, limits)
    assert product == ("packed" if rows <= packed_rows else "dense")
    tokens = torch.randn(rows, 16)
    with torch.no_grad():
        torch.testing.assert_close(multiply(tokens, packed, layer.bias, limits), layer(tokens))


MOST_ROWS = {
    ("avx512_vnni", False): {torch.float32: (128, 64), torch.float16: (None, None), torch.bfloat16: (64, 32)},
    ("avx512_vnni", True): {torch.float32: (128, 64), torch.float16: (8, 4), torch.bfloat16: (8, 4)},
    ("avx512", False): {torch.float32: (128, 64), torch.float16: (None, None), torch.bfloat16: (64, 32)},
    ("avx512", True): {torch.float32: (128, 64), torch.float16: (8, 4), torch.bfloat16: (8, 4)},
    ("avx2", False): {torch.float32: (4, 3), torch.float16: (None, None), torch.bfloat16: (None, None)},
    ("avx2", True): {torch.float32: (4, 3), torch.float16: (4, 4), torch.bfloat16: (4, 4)},
    ("neon_dotprod", False): {torch.float32: (4, 2), torch.float16: (16, 8), torch.bfloat16: (16, 8)},
    ("neon", False): {torch.float32: (4, 2), torch.float16: (16, 8), torch.bfloat16: (16, 8)},
    ("neon", True): {torch.float32: (4, 2), torch.float16: (2, 1), torch.bfloat16: (2, 1)},
    ("portable", False): {torch.float32: (4, 0), torch.float16: (4, 0), torch.bfloat16: (4, 0)},
    ("portable", True): {torch.float32: (4, 0), torch.float16: (1, 0), torch.bfloat16: (1, 0)},
}
"""Largest numbers of rows for which our kernel was faster than unpacking, at 2:4 and at other patterns. The keys are
the instruction set and whether the processor multiplies fp16 and bf16 itself; None stands for any number. Those of NEON
are estimates."""


MOST_EXPANDED_ROWS = {"tiles": (1024, 1024), "vectors": (1024, 128)}
"""The same if our kernel expands weights in bf16 in the cache."""


@pytest.fixture
def compiled(monkeypatch):
    """compiled(isa, native, expansion) pretends that the compiled library has an instruction set and multiplies
    expanded weights in this way, and clears cached limits."""

    def pretend(isa: str, native: bool = False, expansion: str | None = None) -> None:
        monkeypatch.setattr(dispatch, "expansion_of", lambda isa: expansion)
        names = (("bf16", "fp16_arith") if "neon" in isa else ("avx512_bf16", "avx512_fp16")) if native else ()
        monkeypatch.setattr(cpu_library, "isa", lambda: isa)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))
        monkeypatch.setattr(cpu_library, "available", lambda: True)
        dispatch.cpu_limits.cache_clear()

    yield pretend
    dispatch.cpu_limits.cache_clear()


@pytest.mark.parametrize(("isa", "native"), MOST_ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "16:32"])
def test_our_kernel_is_never_taken_beyond_where_it_wins(compiled, isa, native, dtype, pattern):
    compiled(isa, native)
    packed = packed_linear(pruned_linear(8, 32, pattern, dtype), pattern).packed
    most = MOST_ROWS[isa, native][dtype][pattern != "2:4"]
    if most is None:
        assert choose_product(10**6, packed) == "packed"
        return
    assert choose_product(most, packed) == "packed"
    assert choose_product(most + 1, packed) == "dense"


MOST_FEW_BITS_ROWS = {"avx512_vnni": 64, "avx512": 32, "avx2": 32, "neon_dotprod": 16, "neon": 8, "portable": 1}
"""Largest numbers of rows for which our kernel reads quantized weights faster than they are unpacked."""


@pytest.mark.parametrize("isa", MOST_FEW_BITS_ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_are_unpacked_beyond_where_our_kernel_wins_unless_it_expands_them(compiled, isa, dtype, bits):
    packed = packed_linear(pruned_linear(8, 32, "8:16", dtype), "8:16", bits=bits).packed
    compiled(isa, True, "tiles" if isa == "avx512_vnni" else None)
    most = MOST_FEW_BITS_ROWS[isa]
    expanded = isa == "avx512_vnni" and dtype == torch.bfloat16
    assert choose_product(most, packed) == "packed"
    assert choose_product(10**6 if expanded else most + 1, packed) == ("packed" if expanded else "dense")


@pytest.mark.parametrize("expansion", MOST_EXPANDED_ROWS)
@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_expanded_weights_are_multiplied_up_to_where_they_win(compiled, expansion, pattern):
    compiled("avx512", True, expansion)
    most = MOST_EXPANDED_ROWS[expansion][pattern != "2:4"]
    for dtype, last in ((torch.bfloat16, most), (torch.float16, (8, 4)[pattern != "2:4"])):
        packed = packed_linear(pruned_linear(8, 32, pattern, dtype), pattern).packed
        assert choose_product(last, packed) == "packed"
        assert choose_product(last + 1, packed) == "dense"


MOST_ROWS_BESIDE_A_COPY = {"tiles": (512, 512, 512), "vectors": (256, 4, 24)}
"""Largest numbers of rows for which expanded weights were multiplied as fast as the dense weight: at 2:4, at other
patterns, and for quantized weights."""


@pytest.mark.parametrize("expansion", MOST_ROWS_BESIDE_A_COPY)
@pytest.mark.parametrize("pattern", [(2, 4), (8, 16), None])
def test_beside_a_dense_copy_our_kernel_is_taken_only_where_it_is_as_fast(compiled, monkeypatch, expansion, pattern):
    compiled("avx512", True, expansion)
    monkeypatch.setattr(dispatch, "expansion", lambda: expansion)
    two_of_four, other, few_bits = MOST_ROWS_BESIDE_A_COPY[expansion]
    most = two_of_four if pattern == (2, 4) else other
    assert copy_limits(torch.bfloat16, pattern, None, cached=False) == RowLimits(most, dense_copy=True)
    assert copy_limits(torch.bfloat16, pattern, 8, cached=False) == RowLimits(few_bits, dense_copy=True)


EXPANDED_FROM = {"tiles": (5, 3, 5), "vectors": (9, 5, 25)}
"""The first number of rows for which a weight is expanded: at 2:4, at other patterns, and if it is quantized."""


@pytest.mark.parametrize("expansion", EXPANDED_FROM)
@pytest.mark.parametrize("kind", ["2:4", "8:16", "2:4 8 bits", "8:16 4 bits", "dense 8 bits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_expanded_from_where_it_pays(monkeypatch, expansion, kind, dtype):
    expanded = []
    monkeypatch.setattr(kernel, "expansion", lambda: expansion)
    monkeypatch.setattr(kernel, "expanded_linear", lambda tokens, *rest: expanded.append(len(tokens)))
    pattern, bits, *_ = (*kind.split(), None)
    bits = None if bits is None else int(bits)
    layer = pruned_linear(8, 32, "2:4" if pattern == "dense" else pattern, dtype)
    if pattern == "dense":
        packed = QuantizedLinear.from_linear(layer, bits, 32).packed
    else:
        packed = packed_linear(layer, pattern, bits=bits).packed
    for rows in range(1, 40):
        multiply(torch.zeros(rows, 32, dtype=dtype), packed, None, RowLimits(100))
    first = EXPANDED_FROM[expansion][2 if bits else pattern != "2:4"]
    assert expanded == (list(range(first, 40)) if dtype == torch.bfloat16 else [])


def test_what_our_kernel_does_not_serve_is_unpacked(compiled):
    compiled("avx512")
    assert choose_product(1, packed_linear(pruned_linear(8, 16)).double().packed) == "dense"


def test_without_the_compiled_library_a_weight_is_unpacked_for_every_call(monkeypatch):
    layer = pruned_linear(8, 16)
    packed, tokens = packed_linear(layer), torch.randn(3, 16)
    monkeypatch.setattr(cpu_library, "load", lambda: "it was not built")
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    warn_of_slow_backend.cache_clear()
    with pytest.warns(SlowBackendWarning, match=r"it was not built.*Install a C\+\+ compiler") as caught:
        outputs = [packed(tokens).detach() for _ in range(3)]
    assert len(caught) == 1
    assert choose_product(1, packed.packed) == "dense"
    torch.testing.assert_close(outputs, [layer(tokens).detach()] * 3)


@pytest.mark.usefixtures("default_products")
@pytest.mark.parametrize(("backend", "rows"), [("cutlass", (32, 33)), ("cusparselt", (64, None)), (None, (16, None))])
def test_a_gpu_takes_our_kernel_where_it_reads_less_than_unpacking_moves(monkeypatch, backend, rows):
    monkeypatch.setattr(dispatch, "backend_of", lambda device: backend)
    gpu = torch.device("cuda")
    assert default_limits(gpu, torch.bfloat16) == RowLimits(*rows)
    assert default_limits(gpu, torch.float32) == RowLimits(16)
    assert default_limits(gpu, torch.bfloat16, (3, 8)) == RowLimits(4)
    for old, most in ((False, 32), (True, 4)):
        monkeypatch.setattr("ace_triton.packed.dispatch.before_ampere", lambda device, old=old: old)
        assert default_limits(gpu, torch.bfloat16, (8, 16), bits=4) == RowLimits(most)
        assert default_limits(gpu, torch.float32, (8, 16), bits=4) == RowLimits(4)


def test_limits_are_checked():
    for wrong in ({"packed": -1}, {"packed": True}, {"packed": 4, "semi_structured": 2.5}):
        with pytest.raises(ValueError, match="number of rows"):
            RowLimits(**wrong)


def test_a_second_copy_needs_rows_for_it_and_a_library(monkeypatch):
    with pytest.raises(ValueError, match=r"needs semi_structured.*write RowLimits\(64, 65, second_copy=True\)"):
        RowLimits(64, second_copy=True)
    packed, tokens = packed_linear(pruned_linear(8, 16), limits=RowLimits(1, 2, second_copy=True)), torch.randn(3, 16)
    with pytest.warns(UserWarning, match="second_copy=True has no effect.*torch has no 2:4 product for cpu"):
        packed(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed(tokens[:1])
        monkeypatch.setattr("ace_triton.packed.semi_structured.refusal", lambda packed: None)
        packed.limits = RowLimits(1, 4, second_copy=True)
        packed(tokens)


def test_under_lora_the_adapter_learns_and_the_base_stays_sparse():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(packed_linear(pruned_linear(24, 32)), nn.ReLU(), nn.Linear(24, 4))
    config = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    config._register_custom_module({PackedLinear: peft.tuners.lora.Linear})
    adapted = peft.get_peft_model(model, config)
    before = adapted.base_model.model[0].base_layer.unpack()
    adapted(torch.randn(5, 32)).square().sum().backward()
    learning = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert learning == {f"base_model.model.0.lora_{side}.default.weight" for side in "AB"}
    assert torch.equal(adapted.base_model.model[0].base_layer.unpack(), before)
    with pytest.raises(PackedWeightError, match="cannot be written to"):
        adapted.merge_and_unload()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {name: tensor.bfloat16() for name, tensor in state.items()}, "bits, which a cast destroys"),
        (lambda state: state | {"meta": state["meta"].long()}, r"got torch\.int64"),
        (lambda state: state | {"meta": state["meta"] ^ 1}, "metadata of row 0, group 0 keep"),
        (lambda state: packed_linear(pruned_linear(24, 32, "4:8"), "4:8").state_dict(), "keeps exactly 2"),
    ],
    ids=["cast", "another integer", "a flipped bit", "another pattern"],
)
def test_a_state_dict_whose_metadata_do_not_fit_is_refused(assign, change, message):
    model = nn.Sequential(packed_linear(pruned_linear(24, 32)))
    before = model[0].unpack()
    state = {f"0.{name}": tensor for name, tensor in change(model[0].state_dict()).items()}
    with pytest.raises(RuntimeError, match=rf"0\.meta: .*{message}"):
        model.load_state_dict(state, assign=assign)
    assert torch.equal(model[0].unpack(), before)


def test_a_weight_of_int8_loads_its_own_state_and_no_floats():
    weights = torch.arange(1, 9, dtype=torch.int8).repeat_interleave(4).view(2, 16) * torch.tensor([1, 0, 1, 0]).repeat(
        4
    )
    layer, other = (NMLinear(pack_nm(weight.to(torch.int8), 2, 4)) for weight in (weights, -weights))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.unpack(), -weights)
    floats = NMLinear(pack_nm(weights.float(), 2, 4))
    for one, state in ((layer, floats.state_dict()), (floats, layer.state_dict())):
        with pytest.raises(RuntimeError, match="load the weights into a layer with the same bits"):
            one.load_state_dict(state)


def test_a_layer_may_have_buffers_of_its_user():
    packed, tokens = packed_linear(pruned_linear(24, 32)), torch.randn(3, 32)
    expected = packed(tokens)
    packed.register_buffer("calls", torch.zeros(()))
    assert torch.equal(packed(tokens), expected)
    kept = packed.packed
    packed.calls = packed.calls + 1
    assert torch.equal(packed(tokens), expected)
    assert packed.packed.values is kept.values


def test_metadata_keep_their_dtype_whatever_the_module_is_cast_to():
    layer = pruned_linear(24, 32)
    tokens = torch.randn(3, 32)
    for cast in (lambda module: module.type(torch.bfloat16), lambda module: module._apply(lambda t: t.bfloat16())):
        packed = cast(packed_linear(copy.deepcopy(layer)))
        assert (packed.values.dtype, packed.meta.dtype) == (torch.bfloat16, torch.int32)
        torch.testing.assert_close(packed(tokens.bfloat16()).float(), layer(tokens), rtol=3e-2, atol=3e-2)


def test_metadata_cast_behind_the_modules_back_are_refused():
    packed = packed_linear(pruned_linear(24, 32))
    packed.meta = packed.meta.bfloat16()
    for use in (packed.unpack, lambda: packed(torch.randn(3, 32)), lambda: packed(torch.randn(500, 32))):
        with pytest.raises(ValueError, match="bits, which a cast destroys"):
            use()
