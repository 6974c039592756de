"""What only a GPU can show: graphs, streams, threads, waits, sizes beyond 32 bits, and tensor cores at work.

``benchmarks/on_gpu.sh`` runs these beside the tests of the kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from ace_triton import ActivationStats, NMLinear, PruneError, Recipe, RowLimits, prune_linear, prune_model
from ace_triton.checked_terms import read_checks
from ace_triton.kernels import launch, launch_sums
from ace_triton.kernels.coupling import coupling, coupling_reference
from ace_triton.kernels.divergence import divergence, divergence_reference
from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.finite_check import FiniteCheck
from ace_triton.kernels.moments import moments, moments_reference
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import pack_scored
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm, select_nm_reference
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.kernels.weight_sums import keep_relative_importance, weight_sums, weight_sums_reference
from ace_triton.packed.dispatch import multiply
from ace_triton.packed.quantized_linear import QuantizedLinear
from ace_triton.packed.rows_linear import RowsLinear
from ace_triton.prune import prune_checked
from ace_triton.statistics.outputs import OutputStats
from ace_triton.timing import Stopwatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GIB = 2**30


@contextmanager
def no_waits() -> Iterator[None]:
    """torch raises where it would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def needs(memory: float) -> None:
    """Skip where so many GiB are not free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < memory * GIB:
        pytest.skip(f"needs {memory} GiB of free memory")


def packed_layer(out_features: int = 256, in_features: int = 512) -> tuple[nn.Linear, NMLinear]:
    """A pruned layer, dense and packed."""
    torch.manual_seed(0)
    layer = nn.Linear(in_features, out_features, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    prune_linear(layer, None, "magnitude")
    return layer, NMLinear.from_linear(layer, 2, 4).requires_grad_(False)


@pytest.mark.parametrize("length", [1, 7, 2048])
def test_moments_of_one_sequence(length):
    tokens = torch.randn(1, length, 64, device="cuda")
    got, expected = moments(tokens), moments_reference(tokens)
    for name in ("total", "deviation", "sequence_square"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("reduce", [None, "rms"])
def test_statistics_do_not_wait(reduce, padded):
    valid = torch.arange(128, device="cuda").expand(2, 128) >= 28 if padded else None
    stats = ActivationStats(64, outputs=OutputStats(reduce))
    tokens, outputs = torch.randn(2, 128, 64, device="cuda"), torch.randn(2, 128, 48, device="cuda")
    stats.update(tokens, outputs=outputs, valid=valid)
    with no_waits():
        stats.update(tokens, outputs=outputs, valid=valid)
    assert stats.count == stats.outputs.count == (400 if padded else 512)


@pytest.mark.parametrize("method", ["wanda", "ace"])
def test_pruning_does_not_wait_for_checks(method):
    layers = [nn.Linear(64, 48, bias=False, device="cuda") for _ in range(2)]
    tokens, unread, finite = torch.randn(2, 128, 64, device="cuda"), [], FiniteCheck()
    weights = [layer.weight.detach() for layer in layers]
    weights[1][3, 5] = torch.inf
    before = weights[1].clone()
    every = [ActivationStats.from_tokens(tokens, layer=nn.Linear(64, 48, device="cuda")) for _ in layers]
    for weight, stats in zip(weights, every, strict=True):
        keep_relative_importance(weight, finite)
        assert stats.count == stats.outputs.count == 256
    prune_checked(layers[0], weights[0].clone(), every[0], Recipe(method), "compiles", FiniteCheck())
    with no_waits():
        for layer, weight, stats in zip(layers, weights, every, strict=True):
            prune_checked(layer, weight, stats, Recipe(method), "layer", finite, unread=unread)
    with pytest.raises(PruneError, match="the weight holds NaN or infinity"):
        read_checks(unread)
    assert (weights[0] == 0).sum() == weights[0].numel() / 2
    assert torch.equal(weights[1], before)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("form", ["2:4", "2:4, 8 bits", "dense, 4 bits", "rows"])
def test_a_bound_launch_gives_the_same(form, rows):
    layer, _ = packed_layer()
    packed = {
        "2:4": lambda: NMLinear.from_linear(layer, 2, 4),
        "2:4, 8 bits": lambda: NMLinear.from_linear(layer, 2, 4, bits=8),
        "dense, 4 bits": lambda: QuantizedLinear.from_linear(layer, 4, 128, RowLimits(16)),
        "rows": lambda: RowsLinear.from_linear(layer, RowLimits(16)),
    }[form]()
    every = torch.randn(3, rows, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        packed(every[0])
        with no_waits():
            got = [packed(tokens) for tokens in every]
        for tokens, outputs in zip(every, got, strict=True):
            assert torch.equal(outputs, multiply(tokens, packed.packed, packed.bias, packed.limits))
            expected = tokens.float() @ packed.unpack().float().t() + packed.bias.float()
            torch.testing.assert_close(outputs.float(), expected, rtol=2e-2, atol=2e-2)


def test_stages_are_charged_with_what_they_launch():
    clock = Stopwatch(torch.device("cuda"))
    with clock.measure("calibration"), clock.measure("statistics"), no_waits():
        torch.cuda._sleep(50_000_000)
    seconds = clock.seconds()
    assert seconds.statistics > 5 * seconds.calibration
    assert seconds.total >= seconds.statistics > 0.005


@pytest.mark.parametrize("rows", [1, 16, 64, 300])
@pytest.mark.parametrize("called_before", [False, True])
def test_a_graph_of_a_packed_layer(rows, called_before):
    """In the first, what a layer keeps beside its weight would be made while the graph records."""
    layer, packed = packed_layer()
    tokens, other = torch.randn(2, rows, 512, device="cuda", dtype=torch.bfloat16)
    warm = packed if called_before else packed_layer()[1]
    warm(tokens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = packed(tokens)
    with torch.no_grad():
        torch.testing.assert_close(packed(other), layer(other), rtol=2e-2, atol=2e-2)
    tokens.copy_(other)
    graph.replay()
    torch.testing.assert_close(outputs, layer(other), rtol=2e-2, atol=2e-2)


def test_threads_on_a_stream_do_not_mix_findings():
    fine = torch.ones(1 << 20, device="cuda")
    broken = torch.where(torch.arange(len(fine), device="cuda") == 77, torch.nan, fine)
    wrong = []

    def look(tensor: torch.Tensor, finite: bool) -> None:
        wrong.extend(1 for _ in range(300) if all_finite(tensor) is not finite)

    threads = [threading.Thread(target=look, args=of) for of in ((fine, True), (broken, False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_another_stream_and_another_device(index):
    weight = torch.randn(512, 1024, dtype=torch.bfloat16)
    expected = select_nm_reference(weight.clone(), ScoreTerms(), 2, 4)
    with torch.cuda.device(0):
        stream = torch.cuda.Stream(index)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            there = weight.to(f"cuda:{index}", non_blocking=True)
        with torch.cuda.stream(stream), torch.cuda.device(0):
            select_nm(there, ScoreTerms(), 2, 4)
            sums = weight_sums(there)
        torch.cuda.synchronize(index)
    assert torch.equal(there.cpu(), expected)
    torch.testing.assert_close(sums.row.cpu(), weight_sums_reference(expected).row)


@pytest.mark.parametrize(("cols", "pattern"), [(24, (3, 8)), (20, (2, 4)), (32, (2, 4))])
def test_more_tokens_than_an_axis_of_a_grid_has_programs(cols, pattern):
    rows = 4 * 65535 + 3 if cols < 32 else 32 * 65535 + 3
    weight = torch.randn(6, cols, device="cuda", dtype=torch.bfloat16)
    tokens = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
    packed = pack_scored(weight, ScoreTerms(), *pattern)
    expected = tokens[-64:].float() @ unpack_nm(packed).float().t()
    torch.testing.assert_close(nm_linear(tokens, packed)[-64:].float(), expected, rtol=2e-2, atol=2e-2)


def test_a_weight_of_more_than_2_31_elements():
    needs(7)
    weight = torch.empty(70_000, 32_768, device="cuda", dtype=torch.bfloat16).normal_()
    last = weight[-64:].clone()
    select_nm(weight, ScoreTerms(), 2, 4)
    assert torch.equal(weight[-64:], select_nm_reference(last, ScoreTerms(), 2, 4))
    sums = weight_sums(weight)
    torch.testing.assert_close(sums.row[-64:], weight_sums_reference(weight[-64:]).row, rtol=1e-5, atol=0)


def test_tokens_of_more_than_2_31_elements():
    needs(8)
    tokens = torch.empty(2, 300_000, 4096, device="cuda", dtype=torch.bfloat16).normal_()
    got, expected = moments(tokens), tokens[1, :, -8:].double().square().sum(0)
    torch.testing.assert_close(got.sequence_square[1, -8:].double(), expected, rtol=1e-4, atol=0)


def test_logits_of_more_than_2_31_elements():
    needs(14)
    logits = torch.empty(20_000, 128_256, device="cuda", dtype=torch.bfloat16).normal_()
    wanted = torch.empty_like(logits).normal_()
    expected = divergence_reference(logits[-4:], wanted[-4:])
    got = divergence(logits, wanted, into=logits)
    torch.testing.assert_close(got.loss[-4:], expected.loss, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.gradient[-4:].double(), expected.gradient, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("reduce", ["abs", "rms"])
@pytest.mark.parametrize("width", [512, 3072])
def test_coupling_is_exact_to_fp32_in_small_and_large_tiles(reduce, width):
    """Three TF32 products each: mma on most GPUs, tcgen05 with tensor memory on compute capability 10."""
    tokens, outputs = torch.randn(2, 200, width, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(200, device="cuda") + 0.5
    expected = coupling_reference(tokens, outputs, weights, reduce)
    torch.testing.assert_close(coupling(tokens, outputs, weights, reduce), expected, rtol=2e-5, atol=1e-4)


def test_sums_are_planned_for_this_gpu():
    device = torch.device("cuda", 0)
    there = torch.cuda.get_device_properties(device).multi_processor_count
    assert launch.multiprocessors(device) == there
    assert launch_sums.sum_warps(device) % there == 0


@pytest.mark.parametrize("method", ["ace", "wanda"])
def test_a_model(make_decoder, ids, method):
    there, here = make_decoder("llama").cuda(), make_decoder("llama")
    report = prune_model(there, ids.cuda(), method)
    prune_model(here, ids, method)
    for layer in report.layers:
        masks = [model.get_parameter(f"{layer.name}.weight").cpu() != 0 for model in (there, here)]
        assert (masks[0] == masks[1]).float().mean() > 0.98, layer.name
    assert 0 < report.seconds.statistics < report.seconds.total


def test_a_model_spread_over_gpu_memory_and_disk(make_decoder, ids, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    there, spread = make_decoder("llama").cuda(), make_decoder("llama")
    places = {name: 0 for name, _ in spread.named_children()}
    del places["model"]
    places |= {f"model.{name}": 0 for name, _ in spread.model.named_children() if name != "layers"}
    places |= {f"model.layers.{i}": ("cpu", "disk", 0)[i % 3] for i in range(len(spread.model.layers))}
    accelerate.dispatch_model(spread, places, offload_dir=tmp_path)
    for model in (there, spread):
        prune_model(model, ids.cuda())
    torch.testing.assert_close(spread(ids.cuda()).logits, there(ids.cuda()).logits)
