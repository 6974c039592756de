"""Weight updates through prune_linear and prune_model: every metric and pattern, few tokens, dtypes, refusals."""

import copy
import json

import pytest
import torch

from ace_triton import ActivationStats, PruneError, Sparsity, StatsError, Update, metric_names, prune_linear
from ace_triton.decoders.blocks import find_blocks, linears_of
from ace_triton.prune_blocks import prune_model

PATTERNS = ["2:4", "1:4", "4:8", 0.5, Sparsity(0.5, scope="layer"), Sparsity("2:4", axis="out")]
UPDATES = [Update(prior=32, mask_rounds=0), Update(prior=32, mask_rounds=8)]
ON_THE_MASK = Update(mask_rounds=0)
BUILT_IN = [
    name
    for name in metric_names()
    if name in ("magnitude", "wanda", "ria", "stade", "dass", "cosp", "varp", "ace", "sparsegpt")
]


def tokens_of(*shape: int) -> torch.Tensor:
    width = shape[-1]
    return torch.randn(shape) @ (torch.randn(width, width) / width**0.5 + torch.eye(width))


def error(layer: torch.nn.Linear, dense: torch.nn.Linear, tokens: torch.Tensor) -> float:
    return float((layer(tokens) - dense(tokens)).square().sum().detach())


@pytest.mark.parametrize("method", BUILT_IN)
@pytest.mark.parametrize("sparsity", PATTERNS, ids=repr)
def test_every_metric_and_pattern_errs_less_than_its_mask_alone(method, sparsity):
    if method == "sparsegpt" and sparsity == PATTERNS[-1]:
        pytest.skip("SparseGPT has no pattern along the outputs")
    dense, tokens = torch.nn.Linear(64, 32), tokens_of(8, 20, 64)
    alone = copy.deepcopy(dense)
    before = prune_linear(alone, tokens, method, sparsity, return_mask=True)
    for update in UPDATES:
        layer = copy.deepcopy(dense)
        result = prune_linear(layer, tokens, method, sparsity, update=update, return_mask=True)
        assert torch.equal(layer.weight != 0, result.mask)
        assert result.kept == before.kept == int(result.mask.sum())
        assert result.mask.equal(before.mask) or update.mask_rounds
        assert error(layer, dense, tokens) < error(alone, dense, tokens)
        assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize("method", ["wanda", "ria"])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_the_pattern_holds_after_the_mask_was_chosen_again(method, axis):
    layer, tokens = torch.nn.Linear(64, 32), tokens_of(300, 64)
    kept = prune_linear(copy.deepcopy(layer), tokens, method, Sparsity("2:4", axis=axis), return_mask=True).mask
    prune_linear(layer, tokens, method, Sparsity("2:4", axis=axis), update=Update(mask_rounds=12))
    mask = layer.weight != 0
    groups = (mask if axis == "in" else mask.t()).reshape(-1, 4)
    assert groups.sum(1).unique().tolist() == [2]
    assert not torch.equal(mask, kept)


def test_more_rounds_err_less_than_none():
    dense, tokens = torch.nn.Linear(128, 64), tokens_of(1000, 128)
    errors = []
    for update in (None, ON_THE_MASK, Update(mask_rounds=12)):
        layer = copy.deepcopy(dense)
        prune_linear(layer, tokens, "wanda", update=update)
        errors.append(error(layer, dense, tokens))
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.9 * errors[1]


def test_a_prior_lowers_the_error_if_tokens_are_few():
    """Fitted on 32 tokens of 128 channels, evaluated on other tokens: the prior lowers the error."""
    torch.manual_seed(3)
    dense, tokens = torch.nn.Linear(128, 64), tokens_of(3000, 128)
    seen, unseen = tokens[:32], tokens[32:]
    errors = {}
    for name, update in (
        ("mask", None),
        ("free", Update(prior=0.0, damping=1e-4, iterations=200, mask_rounds=0, rescale=False)),
        ("held", Update(iterations=200, mask_rounds=0, rescale=False)),
    ):
        layer = copy.deepcopy(dense)
        prune_linear(layer, seen, "wanda", update=update)
        errors[name] = error(layer, dense, unseen)
    assert errors["held"] < errors["mask"]
    assert errors["held"] < errors["free"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_solution_is_rounded_to_the_weights_dtype_once(dtype):
    layer, tokens = torch.nn.Linear(64, 32).to(dtype), tokens_of(200, 64)
    exact = torch.nn.Linear(64, 32)
    exact.load_state_dict(layer.state_dict())
    stats = ActivationStats.from_tokens(tokens, gram=True)
    prune_linear(layer, stats, "wanda", update="lstsq")
    prune_linear(exact, stats, "wanda", update="lstsq")
    assert torch.equal(layer.weight, exact.weight.to(dtype))


def test_dead_channels_and_dead_inputs():
    dense, tokens = torch.nn.Linear(32, 16), tokens_of(100, 32)
    tokens[:, [0, 5, 6, 7]] = 0
    layer = copy.deepcopy(dense)
    prune_linear(layer, tokens, "wanda", update=Update(mask_rounds=8))
    assert bool(layer.weight.isfinite().all())
    assert error(layer, dense, tokens) < error(torch.nn.Linear(32, 16), dense, tokens)
    silent = copy.deepcopy(dense)
    result = prune_linear(silent, torch.zeros(10, 32), "wanda", update="lstsq", return_mask=True)
    assert torch.equal(silent.weight, torch.where(result.mask, dense.weight, 0.0))


def test_padding_takes_no_part():
    layer, other, tokens = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16), tokens_of(4, 30, 32)
    other.load_state_dict(layer.state_dict())
    valid = torch.rand(4, 30) > 0.4
    noisy = torch.where(valid[..., None], tokens, 100 * torch.randn(4, 30, 32))
    prune_linear(layer, ActivationStats.from_tokens(noisy, valid=valid, gram=True), "magnitude", update=ON_THE_MASK)
    prune_linear(other, tokens[valid], "magnitude", update=ON_THE_MASK)
    torch.testing.assert_close(layer.weight, other.weight, rtol=1e-3, atol=1e-5)


def test_invalid_requests_are_refused_and_change_nothing():
    layer, tokens = torch.nn.Linear(32, 16), torch.randn(50, 32)
    before = layer.weight.detach().clone()
    with pytest.raises(StatsError, match=r"q_proj: .*gram=True"):
        prune_linear(layer, ActivationStats.from_tokens(tokens), "wanda", update="lstsq", name="q_proj")
    with pytest.raises(StatsError, match="ActivationStats or the raw tokens"):
        prune_linear(layer, None, "magnitude", update="lstsq")
    with pytest.raises(ValueError, match="one of rescale, lstsq, or None; got 'obs'"):
        prune_linear(layer, tokens, update="obs")
    for wrong in ({"damping": -1.0}, {"iterations": 1.5}, {"mask_rounds": -1}, {"prior": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Update(**wrong)
    with pytest.raises(ValueError, match="True or False"):
        Update(rescale=1)
    with pytest.raises(ValueError, match="'rescale' has no options"):
        Update("rescale", mask_rounds=3)
    with pytest.raises(ValueError, match="both 0"):
        Update(damping=0, prior=0)
    overflowing = torch.nn.Linear(32, 16).half()
    overflowing.weight.data.fill_(6e4)
    with pytest.raises(PruneError, match=r"leaves the range of torch\.float16"):
        prune_linear(overflowing, torch.ones(50, 32), "magnitude", update="lstsq")
    assert bool((overflowing.weight == overflowing.weight[0, 0]).all())
    assert torch.equal(layer.weight, before)


def block_outputs_error(model, dense, ids) -> float:
    with torch.no_grad():
        difference = model.model(ids).last_hidden_state - dense.model(ids).last_hidden_state
    return float(difference.square().sum())


@pytest.mark.parametrize("options", [{}, {"sequential": "none"}, {"batch_size": 1}], ids=str)
def test_a_model_errs_less_on_its_calibration_text(make_decoder, ids, options):
    dense, alone = make_decoder("llama"), make_decoder("llama")
    prune_model(alone, ids, "wanda", **options)
    for update in UPDATES:
        model = make_decoder("llama")
        report = prune_model(model, ids, "wanda", update=update, **options)
        assert block_outputs_error(model, dense, ids) < block_outputs_error(alone, dense, ids)
        assert report.to_dict()["update"] == update.to_dict()
        for block in find_blocks(model):
            for _, layer in linears_of(block.module, block.name):
                assert bool(((layer.weight != 0).reshape(-1, 4).sum(1) == 2).all())


def test_layers_of_one_input_share_its_gram_matrix(make_decoder, ids):
    """q, k and v get the same weights together as each of them alone."""
    model, single = make_decoder("llama"), make_decoder("llama")
    prune_model(model, ids, "wanda", update=ON_THE_MASK, include="*.layers.0.*")
    seen = []
    attention = single.model.layers[0].self_attn
    hook = attention.q_proj.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    with torch.no_grad():
        single(ids)
    hook.remove()
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = attention.get_submodule(name)
        prune_linear(layer, seen[0], "wanda", update=ON_THE_MASK)
        together = model.model.layers[0].self_attn.get_submodule(name)
        torch.testing.assert_close(together.weight, layer.weight, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [["--method", "sparsegpt"], ["--method", "magnitude", "--update", "lstsq"],
     ["--method", "wanda", "--update", "lstsq", "-u", "mask_rounds=4", "-u", "damping=0.05"],
     ["--method", "ria", "--update", "rescale"]],
    ids=" ".join,
)  # fmt: skip
def test_on_the_command_line(command, tmp_path, tiny_checkpoint, some_text, arguments):
    out = tmp_path / "out"
    text = ("--calibration", some_text, "--samples", 4, "--length", 16)
    code, said, _ = command("prune", tiny_checkpoint, out, *text, *arguments)
    assert code == 0, said
    report = json.loads((out / "ace_triton.json").read_text())
    assert {layer["kept"] for layer in report["layers"]} == {0.5}
    assert (report["update"] is None) == (arguments[1] == "sparsegpt")
    if "-u" in arguments:
        assert (report["update"]["mask_rounds"], report["update"]["damping"]) == (4, 0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--method", "wanda", "-u", "damping=1"], "without --update"), (["--update", "obs"], "one of rescale, lstsq"),
     (["--update", "none", "-u", "damping=1"], "without --update"),
     (["-u", "damping=x"], "--update: damping must be a number, 0 or more; got 'x'"),
     (["--update", "lstsq", "-u", "rounds=3"], "no option 'rounds'; its options: damping=0.02, prior=512.0, iter")],
)  # fmt: skip
def test_the_command_line_refuses(command, tmp_path, tiny_checkpoint, arguments, message):
    code, _, said = command("prune", tiny_checkpoint, tmp_path / "out", *arguments)
    assert code != 0
    assert message in " ".join(said.split())
