"""Each distinct input is collected once, and the statistics are those of the layers' real inputs and outputs."""

import pytest
import torch
from torch import nn

from ace_triton import ActivationStats, PruneError
from ace_triton.decoders.blocks import find_blocks, linears_of
from ace_triton.decoders.collect import InputCollector
from ace_triton.methods.registry import Needs
from ace_triton.timing import Stopwatch

GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
}


def collector_of(layers: dict[str, nn.Module], **needs) -> InputCollector:
    return InputCollector(layers, Needs(**needs), Stopwatch(torch.device("cpu")))


def close(stats: ActivationStats, wanted: ActivationStats) -> None:
    assert stats.count == wanted.count
    torch.testing.assert_close(stats.norm, wanted.norm)
    torch.testing.assert_close(stats.variance, wanted.variance)
    torch.testing.assert_close(stats.sequence_square, wanted.sequence_square)


@pytest.mark.parametrize("name", GROUPS)
def test_layers_that_share_an_input_share_statistics(make_decoder, ids, name):
    model = make_decoder(name)
    block = find_blocks(model)[1]
    collector = collector_of(dict(linears_of(block.module, block.name)))
    for part in ids.split(2):
        with torch.no_grad(), collector.batch(tuple(part.shape), None):
            model(input_ids=part, use_cache=False)
    assert [[layer.rpartition(".")[2] for layer in group] for group in collector.groups] == GROUPS[name]
    for group in collector.groups:
        assert len({id(collector.statistics(layer).mean) for layer in group}) == 1


def test_an_input_read_again_after_another_layer_is_still_the_same(make_decoder, ids):
    """In parallel decoders one normed input feeds attention and, after its output projection, the feed-forward."""
    model = make_decoder("falcon", new_decoder_architecture=False, parallel_attn=True)
    block = find_blocks(model)[0]
    collector = collector_of(dict(linears_of(block.module, block.name)), outputs=True)
    with torch.no_grad(), collector.batch(tuple(ids.shape), None):
        model(input_ids=ids, use_cache=False)
    shared = {layer.rpartition(".")[2] for layer in collector.groups[0]}
    assert shared == {"query_key_value", "dense_h_to_4h"}
    assert all(collector.statistics(layer).outputs.count == ids.numel() for layer in collector.groups[0])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_statistics_are_those_of_the_raw_inputs(make_decoder, ids, name, padded):
    model = make_decoder(name)
    block = find_blocks(model)[0]
    layers = dict(linears_of(block.module, block.name))
    valid = torch.arange(16) < torch.tensor([16, 9, 12, 16, 5, 16])[:, None] if padded else None
    raw = {layer: [] for layer in layers}
    for layer, module in layers.items():
        module.register_forward_hook(
            lambda _m, args, _o, layer=layer: raw[layer].append(args[0].reshape(-1, 16, args[0].shape[-1]))
        )
    collector = collector_of(layers, outputs=True, reduce="abs")
    for start in range(0, 6, 4):
        part, mask = ids[start : start + 4], None if valid is None else valid[start : start + 4]
        with torch.no_grad(), collector.batch(tuple(part.shape), mask):
            model(input_ids=part, attention_mask=None if mask is None else mask.long(), use_cache=False)
    for layer, module in layers.items():
        tokens = torch.cat(raw[layer])
        wanted = ActivationStats.from_tokens(tokens, layer=module, valid=valid, reduce="abs")
        got = collector.statistics(layer)
        close(got, wanted)
        torch.testing.assert_close(
            got.outputs.mean_weighted_square(), wanted.outputs.mean_weighted_square(), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(got.outputs.mean_coupling(), wanted.outputs.mean_coupling(), rtol=1e-5, atol=0)


def run(collector: InputCollector, *calls: tuple[nn.Module, torch.Tensor], valid: torch.Tensor | None = None) -> None:
    with torch.no_grad(), collector.batch((2, 3), valid):
        for layer, tokens in calls:
            layer(tokens)


@pytest.fixture
def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: nn.Linear(4, 4) for name in ("one", "two")}


def test_two_dimensional_inputs_with_every_token_keep_sequences_and_padding(layers):
    tokens, valid = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    collector = collector_of(layers)
    run(collector, (layers["one"], tokens.reshape(6, 4)), valid=valid)
    close(collector.statistics("one"), ActivationStats.from_tokens(tokens, valid=valid))


def test_rows_that_look_like_a_batch_count_as_one_sequence(layers):
    """Two tokens of an expert with as many inputs as the batch has tokens in a sequence."""
    layer, tokens = nn.Linear(3, 4), torch.randn(2, 3)
    collector = collector_of({"one": layer})
    run(collector, (layer, tokens), valid=torch.tensor([[True, True, False], [True, True, True]]))
    close(collector.statistics("one"), ActivationStats.from_tokens(tokens[None]))


def test_outputs_of_another_tower_have_a_mask_of_their_own(layers):
    """Of the same shape as the tower's own tokens, so that only the tensor itself tells them apart."""
    own, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    valid, mask = torch.tensor([[True, True, False], [True, True, True]]), torch.tensor([[True, False, False]] * 2)
    collector = collector_of(layers)
    with torch.no_grad(), collector.batch((2, 3), valid, others=[(other, mask)]):
        layers["one"](own)
        layers["two"](other)
    close(collector.statistics("one"), ActivationStats.from_tokens(own, valid=valid))
    close(collector.statistics("two"), ActivationStats.from_tokens(other, valid=mask))


def test_heads_as_a_third_axis_count_as_tokens(layers):
    tokens, valid = torch.randn(2, 3, 5, 4), torch.tensor([[True, True, False], [True, True, True]])
    collector = collector_of(layers)
    run(collector, (layers["one"], tokens), valid=valid)
    wanted = ActivationStats.from_tokens(tokens.reshape(2, 15, 4), valid=valid.repeat_interleave(5, dim=1))
    close(collector.statistics("one"), wanted)


def test_inputs_made_in_inference_mode_share_statistics(layers):
    """Such a tensor, a calibration input or a learned query, has no version counter."""
    with torch.inference_mode():
        tokens = torch.randn(2, 3, 4)
    collector = collector_of(layers, outputs=True)
    run(collector, *((layer, tokens) for layer in layers.values()))
    assert collector.groups == [["one", "two"]]
    close(collector.statistics("one"), ActivationStats.from_tokens(tokens.clone()))


def test_tokens_routed_to_an_expert_are_one_sequence(layers):
    tokens = torch.randn(5, 4)
    collector = collector_of(layers)
    run(collector, (layers["one"], tokens), valid=torch.zeros(2, 3, dtype=torch.bool))
    close(collector.statistics("one"), ActivationStats.from_tokens(tokens))


def test_layers_without_tokens_have_no_statistics(layers):
    collector = collector_of(layers)
    run(collector, (layers["one"], torch.randn(2, 3, 4)), (layers["two"], torch.empty(0, 4)))
    assert collector.statistics("two") is None


def test_a_layer_called_twice_in_a_batch_sees_all_its_tokens(layers):
    first, second = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    collector = collector_of(layers, outputs=True)
    run(collector, *((layer, tokens) for tokens in (first, second) for layer in layers.values()))
    assert collector.groups == [["one", "two"]]
    close(collector.statistics("two"), ActivationStats.from_tokens(torch.cat([first, second])))
    assert collector.statistics("two").outputs.count == 12


def test_a_layer_first_called_in_a_later_batch_does_not_inherit_earlier_ones(layers):
    first, second = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    collector = collector_of(layers)
    run(collector, (layers["one"], first))
    run(collector, (layers["one"], second), (layers["two"], second))
    close(collector.statistics("one"), ActivationStats.from_tokens(torch.cat([first, second])))
    close(collector.statistics("two"), ActivationStats.from_tokens(second))


def test_a_layer_that_reads_more_than_its_group_in_the_first_batch_leaves_it(layers):
    """ZAYA does this: its delayed values are also computed for a row of zeros."""
    shared, extra, second = torch.randn(2, 3, 4), torch.randn(2, 1, 4), torch.randn(2, 3, 4)
    collector = collector_of(layers, outputs=True)
    for tokens in (shared, second):
        run(collector, (layers["one"], tokens), (layers["two"], tokens), (layers["two"], extra))
    assert collector.groups == [["one"], ["two"]]
    for name, read in (("one", [shared, second]), ("two", [shared, extra, second, extra])):
        wanted, got = ActivationStats.from_tokens(read[0], layer=layers[name]), collector.statistics(name)
        for part in read[1:]:
            tokens = part if part.shape[1] == 3 else part.reshape(1, -1, 4)
            wanted.update(tokens, outputs=layers[name](tokens).detach())
        assert got.count == wanted.count == sum(part.shape[0] * part.shape[1] for part in read)
        torch.testing.assert_close(got.norm, wanted.norm)
        torch.testing.assert_close(got.mean, wanted.mean)
        torch.testing.assert_close(got.outputs.mean_weighted_square(), wanted.outputs.mean_weighted_square())


def test_a_layer_that_joins_after_another_read_more_keeps_to_its_own(layers):
    shared, extra = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    collector = collector_of(layers)
    run(collector, (layers["one"], shared), (layers["one"], extra), (layers["two"], shared))
    close(collector.statistics("one"), ActivationStats.from_tokens(torch.cat([shared, extra])))
    close(collector.statistics("two"), ActivationStats.from_tokens(shared))


def test_a_group_that_splits_later_is_refused(layers):
    shared = torch.randn(2, 3, 4)
    collector = collector_of(layers)
    run(collector, (layers["one"], shared), (layers["two"], shared))
    with pytest.raises(PruneError, match="one and two read the same tensor in an earlier batch but not in this one"):
        run(collector, (layers["one"], shared), (layers["two"], shared.clone()))


def test_outputs_changed_in_place_are_computed_again(layers):
    tokens = torch.randn(2, 3, 4)
    collector = collector_of(layers, outputs=True)
    with torch.no_grad(), collector.batch((2, 3), None):
        layers["one"](tokens).mul_(100)
    wanted = ActivationStats.from_tokens(tokens, layer=layers["one"])
    got = collector.statistics("one").outputs.mean_weighted_square()
    torch.testing.assert_close(got, wanted.outputs.mean_weighted_square())


def test_inputs_changed_in_place_are_another_input(layers):
    tokens = torch.randn(2, 3, 4)
    before = tokens.clone()
    collector = collector_of(layers)
    with torch.no_grad(), collector.batch((2, 3), None):
        layers["one"](tokens)
        layers["two"](tokens.mul_(2))
    close(collector.statistics("one"), ActivationStats.from_tokens(before))
    close(collector.statistics("two"), ActivationStats.from_tokens(before * 2))


def test_inputs_changed_before_their_outputs_are_counted_are_refused(layers):
    tokens = torch.randn(2, 3, 4)
    collector = collector_of(layers, outputs=True)

    def read_and_overwrite() -> None:
        with torch.no_grad(), collector.batch((2, 3), None):
            layers["one"](tokens)
            tokens.mul_(2)

    with pytest.raises(PruneError, match="one: its input is overwritten in place"):
        read_and_overwrite()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_outputs_that_overflow_are_refused(layers, bad):
    torch.nn.init.constant_(layers["one"].bias, bad)
    with pytest.raises(PruneError, match="one: the layer's outputs hold NaN or infinity"):
        run(collector_of(layers, outputs=True), (layers["one"], torch.randn(2, 3, 4)))


def test_outputs_of_padding_do_not_matter(layers):
    tokens, valid = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    collector = collector_of(layers, outputs=True)
    run(collector, (layers["one"], tokens.masked_fill(~valid[..., None], torch.nan)), valid=valid)
    wanted = ActivationStats.from_tokens(tokens, layer=layers["one"], valid=valid)
    got = collector.statistics("one")
    close(got, wanted)
    torch.testing.assert_close(got.outputs.mean_weighted_square(), wanted.outputs.mean_weighted_square())


def test_hooks_are_removed_after_an_error(layers):
    collector = collector_of(layers)
    with pytest.raises(RuntimeError):
        run(collector, (layers["one"], torch.randn(2, 3, 5)))
    assert not any(layer._forward_hooks for layer in layers.values())


def test_double_precision_is_supported(layers):
    tokens = torch.randn(2, 3, 4, dtype=torch.float64)
    collector = collector_of(layers, outputs=True)
    run(collector, (layers["one"].double(), tokens))
    close(collector.statistics("one"), ActivationStats.from_tokens(tokens.float()))


def test_leaves_early_once_every_layer_has_read_its_input(layers):
    parts = torch.randn(3, 2, 3, 4)
    collector, calls = collector_of(layers), []
    layers["two"].register_forward_hook(lambda *_: calls.append("two"))
    for tokens in parts:
        with torch.no_grad(), collector.batch((2, 3), None, leave_early=True):
            layers["two"](layers["one"](tokens))
            calls.append("the rest")
    assert calls == ["two", "the rest"]
    with torch.no_grad():
        second = torch.cat([layers["one"](tokens) for tokens in parts])
    close(collector.statistics("one"), ActivationStats.from_tokens(parts.reshape(6, 3, 4)))
    close(collector.statistics("two"), ActivationStats.from_tokens(second))


def test_does_not_leave_early_if_a_layer_is_called_again(layers):
    parts, again = torch.randn(3, 2, 3, 4), torch.randn(2, 3, 4)
    collector = collector_of(layers)
    for tokens in parts:
        with torch.no_grad(), collector.batch((2, 3), None, leave_early=True):
            for layer, read in (("one", tokens), ("two", tokens + 1), ("one", again)):
                layers[layer](read)
    assert collector.statistics("one").count == 36
    assert collector.statistics("two").count == 18


def test_leaves_after_the_last_output_if_outputs_are_needed(layers):
    parts = torch.randn(3, 2, 3, 4)
    collector, early, calls = collector_of(layers, outputs=True), collector_of(layers, outputs=True), []
    for tokens in parts:
        for watching, leave_early in ((collector, False), (early, True)):
            with torch.no_grad(), watching.batch((2, 3), None, leave_early=leave_early):
                for layer in layers.values():
                    layer(tokens)
                calls.append(leave_early)
    assert calls.count(False) == 3
    assert calls.count(True) == 1
    for name in layers:
        outputs, wanted = early.statistics(name).outputs, collector.statistics(name).outputs
        assert outputs.count == wanted.count == 18
        assert torch.equal(outputs.weighted_square, wanted.weighted_square)
