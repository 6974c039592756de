"""All of SmolLM2-135M: score and mask on the same statistics, and whole runs by stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ace_triton import ActivationStats, prune_linear, prune_model
from ace_triton.decoders.blocks import find_blocks, linears_of
from ace_triton.decoders.calibration_mode import calibration_mode
from ace_triton.decoders.collect import InputCollector
from ace_triton.inputs import checkpoint
from ace_triton.inputs.calibration import load_calibration
from ace_triton.methods.registry import Needs
from ace_triton.timing import Stopwatch
from benchmarks.bench_prune_layer import METHODS
from benchmarks.claims import published, published_model
from benchmarks.conftest import Compare, CompareStages
from benchmarks.harness.agreement import check_same_choice
from benchmarks.harness.comparison import Comparison, Provider

TESTS = ("tests/benchmarks/test_published_baselines.py", "tests/kernels/test_select_nm.py")
SAMPLES, LENGTH = 128, 16


@dataclass
class LoadedModel:
    """The model, its prunable layers, copies of their dense weights, and calibration ids."""

    name: str
    model: Any
    layers: dict[str, nn.Linear]
    dense: dict[str, torch.Tensor]
    ids: torch.Tensor

    def restore(self) -> None:
        for name, layer in self.layers.items():
            layer.weight.data.copy_(self.dense[name])

    @property
    def n_weights(self) -> int:
        return sum(weight.numel() for weight in self.dense.values())


@pytest.fixture(scope="module")
def loaded(device: torch.device, tiny: bool) -> LoadedModel:
    """SmolLM2-135M and 128 sequences of 16 tokens, or a random decoder of two blocks."""
    if tiny:
        torch.manual_seed(0)
        sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        config = LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=2)
        model = LlamaForCausalLM(config).to(device, torch.bfloat16).eval()
        ids = torch.randint(3, 101, (4, LENGTH))
    else:
        try:
            model, tokenizer = checkpoint.load(checkpoint.SMOLLM2, device=device)
        except checkpoint.CheckpointError as error:
            pytest.skip(str(error))
        ids = load_calibration("pydoc:calibration", tokenizer, samples=SAMPLES, length=LENGTH).ids
    found = [entry for block in find_blocks(model) for entry in linears_of(block.module, block.name)]
    layers = {name: layer for name, layer in found if isinstance(layer, nn.Linear)}
    dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    return LoadedModel("random decoder" if tiny else "SmolLM2-135M", model, layers, dense, ids.to(device))


@pytest.fixture(scope="module")
def statistics(loaded: LoadedModel) -> Iterator[dict[str, ActivationStats]]:
    """Statistics of every layer of the dense model; layers that read one input share them."""
    collector = InputCollector(loaded.layers, Needs(outputs=True, reduce="abs"), Stopwatch(loaded.ids.device))
    with calibration_mode(loaded.model), collector.batch((len(loaded.ids), LENGTH), None):
        loaded.model(loaded.ids)
    seen = {name: collector.statistics(name) for name in loaded.layers}
    yield {name: stats for name, stats in seen.items() if stats is not None}
    loaded.restore()


@pytest.mark.quick
@pytest.mark.parametrize("method", METHODS)
def test_score_and_mask(
    compare: Compare, loaded: LoadedModel, statistics: dict[str, ActivationStats], method: str
) -> None:
    """Ours also checks every weight for NaN. As in prune_model, layers that share an input share the vectors that are
    derived from its statistics, once in every round."""
    fresh: dict[str, ActivationStats] = {}
    mean_square = {name: stats.norm.square() for name, stats in statistics.items()}

    def restore() -> None:
        loaded.restore()
        inputs: dict[int, ActivationStats] = {}
        for name, stats in statistics.items():
            shared = inputs.setdefault(id(stats.mean), stats.to(loaded.ids.device))
            fresh[name] = shared.with_outputs(stats.outputs)

    def ours() -> None:
        for name, layer in loaded.layers.items():
            prune_linear(layer, fresh[name], method, "2:4")

    def scores(name: str) -> torch.Tensor:
        stats = statistics[name]
        assert stats.outputs is not None
        norms = published.InputNorms(mean_square[name])
        outputs = stats.outputs
        loss = outputs.mean_coupling() if method == "ace-paper" else outputs.mean_weighted_square().float()
        seen = published_model.LayerStatistics(norms, [stats.sequence_square], loss, 1)
        return seen.scores(method, loaded.layers[name].weight.data)

    def theirs() -> None:
        for name, layer in loaded.layers.items():
            published.prune_groups(layer.weight.data, scores(name), 2, 4)

    def check() -> None:
        masks = []
        for call in (ours, theirs):
            restore()
            call()
            masks.append({name: layer.weight != 0 for name, layer in loaded.layers.items()})
        loaded.restore()
        for name in loaded.layers:
            check_same_choice(scores(name), masks[0][name], masks[1][name], 4)

    compare(
        Comparison(
            f"score and mask 2:4, {method}",
            (loaded.name,),
            loaded.model.dtype,
            ours,
            (Provider("published loop", theirs),),
            2 * loaded.n_weights * loaded.model.dtype.itemsize,
            check,
            restore,
        )
    )


@pytest.mark.parametrize("method", ["wanda", "ria", "ace"])
def test_stages(compare_stages: CompareStages, loaded: LoadedModel, method: str) -> None:
    """Both run the same forwards in batches of the same size; only the work between them differs."""

    def ours() -> Any:
        loaded.restore()
        return prune_model(loaded.model, loaded.ids, method, "2:4", batch_size=SAMPLES).seconds

    def theirs() -> Any:
        loaded.restore()
        return published_model.prune_model(loaded.model, loaded.ids, method, 2, 4, batch_size=SAMPLES)

    compare_stages(
        f"2:4, {method}, {len(loaded.ids)} x {LENGTH} tokens", (loaded.name,), loaded.model.dtype, ours, theirs
    )
    loaded.restore()
