"""The update "rescale", with a sample of tokens or the Gram matrix, and the sample itself."""

import copy

import pytest
import torch

from ace_triton import ActivationStats, StatsError, Update, prune_linear
from ace_triton.prune_blocks import prune_model
from ace_triton.solvers.update import LARGEST_SCALE
from ace_triton.statistics.token_sample import SAMPLE_TOKENS, TokenSample


def correlated(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape) @ (torch.randn(shape[-1], shape[-1]) / shape[-1] ** 0.5 + torch.eye(shape[-1]))


def energies(layer: torch.nn.Linear, tokens: torch.Tensor) -> torch.Tensor:
    return (tokens.double() @ layer.weight.detach().double().t()).square().sum(0)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
def test_every_row_gets_its_energy_back(gram, sparsity):
    dense, tokens = torch.nn.Linear(64, 32, bias=False), correlated(400, 64).bfloat16()
    stats = ActivationStats.from_tokens(tokens, gram=gram, sample=not gram)
    alone, layer = copy.deepcopy(dense), copy.deepcopy(dense)
    mask = prune_linear(alone, stats, "wanda", sparsity, return_mask=True).mask
    result = prune_linear(layer, stats, "wanda", sparsity, update="rescale", return_mask=True)
    assert torch.equal(result.mask, mask)
    assert torch.equal(layer.weight != 0, mask)
    torch.testing.assert_close(energies(layer, tokens), energies(dense, tokens), rtol=2e-2, atol=0.0)
    assert bool((energies(alone, tokens) < 0.97 * energies(dense, tokens)).any())
    scale = (layer.weight / alone.weight)[mask].detach()
    rows = mask.nonzero()[:, 0]
    torch.testing.assert_close(scale, scale[rows.unique_consecutive(return_counts=True)[1].cumsum(0) - 1][rows])


def test_least_squares_gives_energy_back_too():
    dense, tokens = torch.nn.Linear(64, 32, bias=False), correlated(400, 64).bfloat16()
    stats = ActivationStats.from_tokens(tokens, gram=True)
    kept, shrunk = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_linear(kept, stats, "wanda", update="lstsq")
    prune_linear(shrunk, stats, "wanda", update=Update(rescale=False))
    torch.testing.assert_close(energies(kept, tokens), energies(dense, tokens), rtol=2e-2, atol=0.0)
    assert float(energies(shrunk, tokens).sum()) < 0.95 * float(energies(dense, tokens).sum())


def test_dead_rows_and_rows_that_lost_nearly_all():
    """A row without outputs keeps its scale. A row that lost nearly all energy is scaled by the limit."""
    layer = torch.nn.Linear(4, 3, bias=False)
    layer.weight.data = torch.tensor([[0.0, 0, 0, 0], [1e-3, 1e-3, 1, 1], [1.0, 1, 1e-3, 1e-3]])
    tokens = torch.tensor([[1.0, 1, 1e-3, 1e-3]]).repeat(8, 1)
    prune_linear(layer, tokens, "magnitude", update="rescale")
    assert bool((layer.weight[0] == 0).all())
    torch.testing.assert_close(layer.weight[1], torch.tensor([0.0, 0, LARGEST_SCALE, LARGEST_SCALE]), rtol=1e-2, atol=0)
    torch.testing.assert_close(layer.weight[2, :2], torch.ones(2), rtol=1e-2, atol=0)


def test_it_follows_a_solver_and_needs_tokens():
    dense, tokens = torch.nn.Linear(64, 32, bias=False), correlated(400, 64).bfloat16()
    layer = copy.deepcopy(dense)
    prune_linear(layer, tokens, "sparsegpt", update="rescale")
    torch.testing.assert_close(energies(layer, tokens), energies(dense, tokens), rtol=2e-2, atol=0.0)
    with pytest.raises(StatsError, match="sample=True"):
        prune_linear(dense, ActivationStats.from_tokens(tokens), "wanda", update="rescale")


def test_a_model_is_rescaled_from_samples(make_decoder, ids):
    alone, model = make_decoder("llama"), make_decoder("llama")
    prune_model(alone, ids, "wanda")
    report = prune_model(model, ids, "wanda", update="rescale")
    assert report.to_dict()["update"]["kind"] == "rescale"
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(first) != 0, alone.get_parameter(first) != 0)
    assert not torch.equal(model.get_parameter(first), alone.get_parameter(first))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_sample_leaves_out_where_attention_sinks(padding):
    """Each token holds its position in the text. Sequences have four, two and one tokens."""
    tokens = torch.arange(12.0).view(3, 4, 1)
    lengths = [4, 4, 4] if padding == "none" else [4, 2, 1]
    valid = torch.stack([torch.arange(4) < length for length in lengths])
    valid = valid.flip(1) if padding == "left" else valid
    sample = TokenSample(1)
    sample.update(tokens, None if padding == "none" else valid)
    wanted = {"none": [1, 2, 3, 5, 6, 7, 9, 10, 11], "left": [1, 2, 3, 7, 11], "right": [1, 2, 3, 5, 8]}[padding]
    assert sample.tokens.flatten().tolist() == wanted
    assert sample.count == len(wanted)


def test_the_first_tokens_energy_does_not_scale_rows():
    dense, tokens = torch.nn.Linear(64, 32, bias=False), correlated(8, 50, 64).bfloat16()
    loud = tokens.clone()
    loud[:, 0, :4] = 300.0
    layer = copy.deepcopy(dense)
    prune_linear(layer, loud, "magnitude", update="rescale")
    torch.testing.assert_close(
        energies(layer, tokens[:, 1:].flatten(0, 1)),
        energies(dense, tokens[:, 1:].flatten(0, 1)),
        rtol=2e-2,
        atol=0.0,
    )


def test_a_sample_is_uniform_and_mergeable(tmp_path):
    """Each token holds its number. For any batches, draws are uniform, without repeats and without padding."""
    total = 6 * SAMPLE_TOKENS
    numbers = torch.arange(total, dtype=torch.float32)
    tokens = torch.stack([numbers, -numbers], 1)
    valid = torch.arange(total) % 3 != 0
    whole, parts = TokenSample(2), TokenSample(2)
    whole.update(tokens, valid)
    for start in range(0, total, 700):
        parts.update(tokens[start : start + 700], valid[start : start + 700])
    for sample in (whole, parts, whole.reordered(torch.tensor([0, 1]))):
        assert sample.count == int(valid.sum())
        seen = sample.tokens[:, 0]
        assert len(seen) == SAMPLE_TOKENS == len(seen.unique())
        assert bool((seen % 3 != 0).all())
        quarters = torch.histc(seen, 4, 0, total)
        assert bool((quarters > 0.75 * SAMPLE_TOKENS / 4).all())
    first, second = (ActivationStats.from_tokens(half, sample=True) for half in tokens.chunk(2))
    first.merge(second)
    first.save(tmp_path / "stats.safetensors")
    loaded = ActivationStats.load(tmp_path / "stats.safetensors")
    assert torch.equal(loaded.sample.tokens, first.sample.tokens)
    assert loaded.sample.count == total
    assert int((loaded.sample.tokens[:, 0] >= total / 2).sum()) > SAMPLE_TOKENS / 3
    first.reorder(torch.tensor([1, 0]))
    assert bool((first.sample.tokens[:, 0] <= 0).all())
    with pytest.raises(StatsError, match="without a sample"):
        first.merge(ActivationStats.from_tokens(tokens))
    with pytest.raises(ValueError, match="3 channels"):
        whole.update(torch.zeros(4, 3))
