"""The terms of the estimate, next to what the statistics of a real run hold."""

from dataclasses import replace

import pytest
import torch

from ace_triton import Recipe, Update
from ace_triton.decoders.blocks import find_blocks
from ace_triton.decoders.collect import InputCollector
from ace_triton.planning.layers import planned
from ace_triton.planning.memory import Calibrated, Need, logit_bytes
from ace_triton.statistics.activation import ActivationStats
from ace_triton.statistics.statistic import Statistic
from ace_triton.timing import Stopwatch

CALIBRATED = Calibrated(samples=6, length=16)
RECIPES = {
    "wanda": Recipe("wanda"),
    "lstsq": Recipe("wanda", update="lstsq"),
    "rescale": Recipe("wanda", update="rescale"),
    "cosp": Recipe("cosp"),
    "ace-paper": Recipe("ace-paper"),
}


def need_of(model, recipe, **changes) -> Need:
    facts = {"calibrated": CALIBRATED, "base_bytes": 0, "stored_bytes": 0, "converts": False, "is_gguf": False}
    return Need(model, planned(model, recipe), recipe, **{**facts, **changes})


def held(value) -> dict[int, int]:
    """Bytes of all tensors that an object holds, by their memory."""
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr(): value.nbytes}
    inside = vars(value).values() if isinstance(value, Statistic) else ()
    inside = value.parts.values() if isinstance(value, ActivationStats) else inside
    inside = value if isinstance(value, (list, tuple)) else inside
    return {place: size for part in inside for place, size in held(part).items()}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_statistics_take_what_is_estimated(recipe, make_decoder, ids):
    model = make_decoder("llama")
    need = need_of(model, recipe)
    unit = need.layers.plan.units[0]
    collector = InputCollector(unit.observed, recipe.needs, Stopwatch(ids.device))
    with torch.no_grad(), collector.batch((6, 16), None):
        model(input_ids=ids)
    total: dict[int, int] = {}
    for name in unit.observed:
        total |= held(collector.statistics(name))
    estimated = need._statistics_bytes(need.layers.units[0].layers)
    # At most 512 tokens are sampled, and the estimate assumes that there are as many.
    sampled = 512 - 6 * 15 if recipe.needs.sample else 0
    widths = sum(group[0].inputs for group in need.layers.units[0].groups)
    assert sum(total.values()) == pytest.approx(estimated - sampled * widths * 4, rel=0.1)


def test_gram_matrices_of_a_block_are_there_together(make_decoder):
    """Three inputs of 32 channels and one of 48, 4 bytes an element."""
    model = make_decoder("llama")
    plain, gram = (need_of(model, RECIPES[name]) for name in ("wanda", "lstsq"))
    layers = plain.layers.units[0].layers
    assert gram._statistics_bytes(layers) - plain._statistics_bytes(layers) == 4 * (3 * 32**2 + 48**2)


def test_a_run_by_layers_holds_the_hidden_states_twice(make_decoder):
    model = make_decoder("llama")
    blocks, layers = need_of(model, RECIPES["wanda"]), need_of(model, replace(RECIPES["wanda"], sequential="layers"))
    assert blocks._hidden_bytes() == 6 * 16 * 32 * 4
    assert layers._hidden_bytes() == 2 * blocks._hidden_bytes()


def test_a_run_at_once_holds_the_statistics_of_all_blocks(make_decoder):
    model = make_decoder("llama")
    by_block, at_once = (need_of(model, replace(RECIPES["lstsq"], sequential=name)) for name in ("blocks", "none"))
    of_a_block = by_block._statistics_bytes(by_block.layers.units[0].layers)
    assert at_once._most_of_a_unit() - by_block._most_of_a_unit() == 2 * of_a_block


def test_streaming_holds_one_block(make_decoder):
    model = make_decoder("llama", num_hidden_layers=12)
    need = need_of(model, RECIPES["lstsq"])
    block = sum(p.nbytes for p in find_blocks(model)[0].module.parameters())
    whole = sum(p.nbytes for p in model.parameters())
    assert need.in_memory().phases["prune"] - need.streamed().phases["prune"] == whole - block


def test_files_count_when_they_are_converted(make_decoder):
    model = make_decoder("llama")
    need = need_of(model, RECIPES["wanda"], stored_bytes=1000, converts=True, base_bytes=10)
    loading = need.in_memory()
    assert loading.phases["load the model"] == 10 + need.weight_bytes
    assert loading.file_pages["load the model"] == need.streamed().file_pages["copy the weights"] == 1000
    as_stored = need_of(model, RECIPES["wanda"], stored_bytes=1000, base_bytes=10)
    assert as_stored.in_memory().peak_resident == as_stored.in_memory().peak
    assert as_stored.streamed().peak_resident == as_stored.streamed().peak


def test_the_check_of_the_text_holds_logits_and_their_loss(make_decoder):
    """101 logits a token in float32, and as many in the loss."""
    model = make_decoder("llama")
    given = need_of(model, RECIPES["wanda"])
    read = need_of(model, RECIPES["wanda"], calibrated=replace(CALIBRATED, text_tokens=10))
    assert "check the text" not in given.in_memory().phases
    assert read.in_memory().phases["check the text"] == read.weight_bytes + 16 * 101 * 8
    assert read.in_memory().phases["tokenize the text"] == read.weight_bytes + 1280


def test_the_loss_of_a_long_text_is_computed_in_parts(make_decoder):
    """200 tokens of 101 logits in float32; the loss of 128 of them. In bfloat16 their fp32 copies too."""
    model = make_decoder("llama")
    assert logit_bytes(model, 200, 128) == 101 * (200 + 128) * 4
    assert logit_bytes(model.bfloat16(), 200, 128) == 101 * (200 * 2 + 128 * 8)


def test_more_mask_rounds_take_no_more_memory(make_decoder):
    model = make_decoder("llama")
    few, many = (need_of(model, Recipe("wanda", update=Update(mask_rounds=n))).in_memory().peak for n in (2, 8))
    assert few == many


def test_a_forward_on_a_gpu_takes_eight_times_the_tokens(make_decoder):
    many = replace(CALIBRATED, samples=1024)
    assert many.batch_tokens == 2048
    assert replace(many, on_gpu=True).batch_tokens == 16384
    assert replace(many, on_gpu=True, batch_size=3).batch_tokens == 48
    need = need_of(make_decoder("llama"), Recipe("wanda"), calibrated=many)
    grown = need.device().phases["prune"] - need.in_memory().phases["prune"]
    unit = need.layers.units[0]
    assert grown == pytest.approx(7 * need._activation_bytes(unit), rel=0.1)
