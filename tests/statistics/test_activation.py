import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

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


def saved(tmp_path, change) -> str:
    """A file of statistics after ``change(facts, tensors)``."""
    layer = torch.nn.Linear(16, 4)
    stats = ActivationStats.from_tokens(torch.randn(3, 5, 16), layer=layer, reduce="abs", gram=True, sample=True)
    stats.consumer_norm = torch.rand(4)
    path = str(tmp_path / "stats.safetensors")
    stats.save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["ace_triton"])
    change(facts, tensors)
    save_file(tensors, path, metadata={"ace_triton": json.dumps(facts)})
    return path


def spoilt(name, value):
    def change(facts, tensors):
        tensors[name].view(-1)[-1] = value

    return change


def changed(name, change):
    return lambda facts, tensors: tensors.update({name: change(tensors[name]).clone()})


DAMAGED = {
    "squares in bf16": (changed("sequence_square", torch.Tensor.bfloat16), "sequence_square must be torch.float32"),
    "squares in fp64": (changed("sequence_square", torch.Tensor.double), "got torch.float64"),
    "a mean of one channel": (changed("mean", lambda t: t[:1]), r"mean must have shape \[16\], got \[1\]"),
    "a mean in int64": (changed("mean", torch.Tensor.long), "mean must be torch.float64"),
    "draws of other tokens": (changed("draws", lambda t: t[1:]), r"sample must have shape \[11, 16\]"),
    "a Gram matrix of other channels": (changed("gram", lambda t: t[:4]), r"gram must have shape \[16, 16\]"),
    "no deviation": (lambda f, t: t.pop("deviation"), "no tensor deviation"),
    "a tensor too many": (lambda f, t: t.update(more=torch.zeros(2)), "unknown tensors: more"),
    "no draws": (lambda f, t: t.pop("draws"), "only one of sample and draws, which belong together"),
    "no outputs": (lambda f, t: f.pop("outputs"), "only one of outputs and weighted_square, which belong together"),
    "no coupling": (lambda f, t: t.pop("coupling"), "reduce='abs'"),
    "a negative count": (lambda f, t: f.update(count=-1), "count must be a whole number, 1 or more, got -1"),
    "a count in words": (lambda f, t: f.update(count="15"), "got '15'"),
    "another count": (lambda f, t: f.update(count=14), "the sum of sequence_count is 15 tokens, but count is 14"),
    "no in_features": (lambda f, t: f.pop("in_features"), "the header must have in_features and count"),
    "other in_features": (lambda f, t: f.update(in_features=8), r"coupling must have shape \[4, 8\]"),
    "outputs that are a list": (lambda f, t: f.update(outputs=[]), "outputs must have"),
    "a reduce of its own": (lambda f, t: f["outputs"].update(reduce="max"), "reduce of outputs"),
    "a unit of 0": (lambda f, t: f["outputs"].update(unit=0), "unit of outputs must be a number above 0"),
    "a mean of NaN": (spoilt("mean", torch.nan), "mean holds NaN or infinity"),
    "squares of infinity": (spoilt("sequence_square", torch.inf), "sequence_square holds NaN or infinity"),
    "a negative square": (spoilt("sequence_square", -1.0), "sequence_square holds negative values"),
    "a negative deviation": (spoilt("deviation", -1.0), "deviation holds negative values"),
    "a negative coupling": (spoilt("coupling", -1.0), "coupling holds negative values"),
    "a negative norm": (spoilt("consumer_norm", -1.0), "consumer_norm holds negative values"),
    "a sequence of -1 tokens": (spoilt("sequence_count", -1), "sequence_count holds negative values"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_with_its_name_and_what_is_wrong(tmp_path, damage):
    change, message = DAMAGED[damage]
    path = saved(tmp_path, change)
    with pytest.raises(StatsError, match=f"{re.escape(path)}: .*{message}"):
        ActivationStats.load(path)


def test_what_cannot_be_written_is_one_error(tmp_path):
    stats = ActivationStats.from_tokens(torch.randn(3, 16))
    with pytest.raises(StatsError, match="statistics cannot be written"):
        stats.save(tmp_path / "none" / "stats.safetensors")


def state(stats: ActivationStats) -> list[object]:
    """All that statistics hold, in plain lists."""
    outputs = stats.outputs
    tensors = [stats.mean, stats.deviation, stats.sequence_square, stats.sequence_count]
    tensors += [stats.gram.matrix, stats.sample.tokens, outputs.weighted_square, outputs.matrix]
    return [
        stats.count,
        stats.gram.count,
        stats.sample.count,
        outputs.count,
        outputs.unit,
        *(t.tolist() for t in tensors),
    ]


@pytest.mark.parametrize("reduce", ["abs", "rms"])
def test_what_is_refused_leaves_the_statistics_as_they_were(reduce):
    layer, tokens = torch.nn.Linear(8, 4), torch.randn(2, 5, 8)
    kept = {"gram": True, "sample": True}
    stats = ActivationStats.from_tokens(tokens, layer=layer, reduce=reduce, **kept)
    before = state(stats)
    outputs = layer(tokens).detach()
    poisoned = outputs.clone()
    poisoned[0, 0] = torch.nan
    other = "rms" if reduce == "abs" else "abs"
    wider = torch.nn.Linear(8, 6)
    refused = [
        lambda: stats.update(tokens, outputs=poisoned),
        lambda: stats.update(tokens, outputs=outputs[:, :3]),
        lambda: stats.update(tokens, outputs=wider(tokens).detach()),
        lambda: stats.update(tokens[..., :4], outputs=outputs),
        lambda: stats.update(tokens.to("meta"), outputs=outputs),
        lambda: stats.update(tokens[0, 0], outputs=outputs[0, 0]),
        lambda: stats.update(tokens, outputs=outputs, valid=torch.ones(2, 4, dtype=torch.bool)),
        lambda: stats.merge(ActivationStats.from_tokens(tokens, layer=layer, reduce=other, **kept)),
        lambda: stats.merge(ActivationStats.from_tokens(tokens, layer=wider, reduce=reduce, **kept)),
        lambda: stats.merge(ActivationStats.from_tokens(tokens, layer=layer, reduce=reduce, gram=True)),
    ]
    for refuse in refused:
        with pytest.raises(ValueError):  # noqa: PT011
            refuse()
        assert state(stats) == before


def test_layers_that_share_an_input_are_all_left_as_they_were_if_one_is_refused():
    tokens = torch.randn(2, 6, 10)
    stats = [OutputStats("abs"), OutputStats("abs")]
    good, bad = torch.randn(2, 6, 4), torch.full((2, 6, 3), torch.inf)
    with pytest.raises(StatsError, match="NaN or infinity"):
        update_outputs(stats, tokens, [good, bad])
    assert stats == [OutputStats("abs"), OutputStats("abs")]
