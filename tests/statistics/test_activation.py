import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_triton import ActivationStats, StatsError
from ace_triton.statistics.outputs import OutputStats, update_outputs


def assert_same(one: ActivationStats, other: ActivationStats, rtol: float = 1e-5, *, sequences: bool = True) -> None:
    assert one.count == other.count
    for name in ("mean", "deviation", "variance", *(["norm"] if sequences else [])):
        expected = getattr(one, name)
        scale = expected.abs().max()
        torch.testing.assert_close(getattr(other, name) / scale, expected / scale, rtol=rtol, atol=rtol, msg=name)
    if one.outputs is not None:
        a, b = one.outputs, other.outputs
        torch.testing.assert_close(a.mean_weighted_square(), b.mean_weighted_square(), rtol=rtol, atol=0)
        if a.reduce is not None:
            torch.testing.assert_close(a.mean_coupling(), b.mean_coupling(), rtol=1e-4, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    reduce=st.sampled_from([None, "abs", "rms"]),
    mean=st.sampled_from([0.0, 3.0, 1000.0]),
    merged=st.booleans(),
)
def test_any_split_gives_the_one_shot_result(lengths, reduce, mean, merged):
    generator = torch.Generator().manual_seed(sum(lengths))
    layer = torch.nn.Linear(12, 7)
    tokens = torch.randn(sum(lengths), 6, 12, generator=generator) + mean
    whole = ActivationStats.from_tokens(tokens, layer=layer, reduce=reduce)
    streamed = ActivationStats(12, outputs=OutputStats(reduce))
    with torch.no_grad():
        for part in tokens.split(lengths):
            if merged:
                streamed.merge(ActivationStats.from_tokens(part, layer=layer, reduce=reduce))
            else:
                streamed.update(part, outputs=layer(part))
    assert_same(whole, streamed)
    torch.testing.assert_close(whole.sequence_square, streamed.sequence_square)


def test_padding_is_left_out_whatever_it_holds():
    tokens = torch.randn(3, 8, 16)
    valid = torch.ones(3, 8, dtype=torch.bool)
    valid[0, :5] = False
    valid[2, 7] = False
    poisoned = torch.where(valid[..., None], tokens, float("nan"))
    layer = torch.nn.Linear(16, 4)
    stats = ActivationStats.from_tokens(poisoned, layer=layer, valid=valid, reduce="abs")
    kept = tokens[valid]
    alone = ActivationStats.from_tokens(kept, layer=layer, reduce="abs")
    assert stats.count == len(kept)
    assert stats.sequence_count.tolist() == [3, 8, 7]
    assert_same(alone, stats, sequences=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_against_fp64(dtype):
    tokens = (torch.randn(5, 9, 33) * 3 + 1).to(dtype)
    stats = ActivationStats.from_tokens(tokens)
    x = tokens.double().reshape(-1, 33)
    torch.testing.assert_close(stats.mean, x.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.variance.double(), x.var(0, correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.norm.double(), (x.square().sum(0) / 5).sqrt(), rtol=1e-5, atol=0)


def test_layers_that_share_an_input_share_one_pass():
    tokens = torch.randn(2, 6, 10)
    layers = [torch.nn.Linear(10, width) for width in (4, 8, 3)]
    with torch.no_grad():
        outputs = [layer(tokens) for layer in layers]
        shared = [OutputStats() for _ in layers]
        update_outputs(shared, tokens, outputs)
    for layer, stat in zip(layers, shared, strict=True):
        alone = ActivationStats.from_tokens(tokens, layer=layer).outputs
        torch.testing.assert_close(stat.mean_weighted_square(), alone.mean_weighted_square(), rtol=1e-5, atol=0)


def test_tokens_with_no_output_take_no_part_in_cosp():
    tokens = torch.randn(4, 8)
    outputs = torch.randn(4, 3)
    outputs[1] = 0
    stat = OutputStats()
    update_outputs([stat], tokens, [outputs])
    kept = torch.tensor([0, 2, 3])
    expected = (tokens[kept].double().square() / outputs[kept].double().square().sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(stat.mean_weighted_square(), expected, rtol=1e-5, atol=0)
    assert stat.count == 3


@pytest.mark.parametrize("reduce", [None, "rms"])
def test_saved_statistics_load_the_same(tmp_path, reduce):
    layer = torch.nn.Linear(16, 4)
    stats = ActivationStats.from_tokens(torch.randn(3, 5, 16), layer=layer, reduce=reduce)
    stats.consumer_norm = torch.rand(4)
    stats.save(tmp_path / "stats.safetensors")
    again = ActivationStats.load(tmp_path / "stats.safetensors")
    assert_same(stats, again, rtol=0)
    assert torch.equal(stats.consumer_norm, again.consumer_norm)
    again.update(torch.randn(2, 5, 16), outputs=torch.randn(2, 5, 4))
    assert again.n_sequences == 5


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(StatsError, match="cannot be read"):
        ActivationStats.load(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(StatsError, match="cannot be read"):
        ActivationStats.load(tmp_path / "broken.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(StatsError, match="not activation statistics"):
        ActivationStats.load(tmp_path / "other.safetensors")


def test_misuse_says_what_to_do():
    stats = ActivationStats(8)
    with pytest.raises(StatsError, match="no token"):
        _ = stats.variance
    with pytest.raises(StatsError, match="channels"):
        stats.update(torch.randn(3, 9))
    with pytest.raises(StatsError, match="layer="):
        stats.update(torch.randn(3, 8), outputs=torch.randn(3, 2))
    with pytest.raises(StatsError, match="outputs="):
        ActivationStats(8, outputs=OutputStats()).update(torch.randn(3, 8))
    with pytest.raises(StatsError, match="merge"):
        stats.merge(ActivationStats(9))
    with pytest.raises(StatsError, match="merge"):
        OutputStats("abs").merge(OutputStats("rms"))
