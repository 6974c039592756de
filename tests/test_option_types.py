"""Options of methods and updates: types come from signatures; an invalid value gives one clear line before any work."""

import inspect
from typing import Annotated, Literal

import pytest
import torch

from ace_triton import PruneError, ScoreTerms, StatsError, Update, prune_linear, prune_model, register_metric
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.methods.registry import _REGISTRY, metric
from ace_triton.option_types import OneOf, Range, option_types, read_options


@pytest.fixture
def register(monkeypatch):
    """register_metric; registrations are removed after the test."""
    monkeypatch.setattr("ace_triton.methods.registry._REGISTRY", dict(_REGISTRY))
    return register_metric


def many(
    weight,
    stats,
    share: Annotated[float, Range(above=0, most=1)] = 0.5,
    rounds: Annotated[int, Range(least=1)] = 2,
    fast: bool = True,
    base: Literal["a", "b", 3] = "a",
    seed: int | None = None,
    power: Annotated[float, OneOf(1, 0.75)] = 1.0,
    plain=1,
    name_of_it="x",
    anything=None,
):
    return ScoreTerms()


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("share=1e-3", 0.001),
        ("share=1", 1.0),
        ("rounds=12", 12),
        ("fast=false", False),
        ("base=b", "b"),
        ("base=3", 3),
        ("seed=none", None),
        ("power=.75", 0.75),
        ("seed=4", 4),
        ("plain=2.5", 2.5),
        ("name_of_it=3", "3"),
        ("anything=(1, 2)", (1, 2)),
        ("anything=word", "word"),
    ],
)
def test_a_pair_is_read_as_its_type(pair, value):
    (found,) = read_options(option_types(many, 2), [pair], "m", "-o").values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("share=nan", "m: share must be a number, above 0 and 1 or less; got nan"),
        ("share=x", "share must be a number"),
        ("share=0", "above 0"),
        ("rounds=0", "rounds must be a whole number, 1 or more; got 0"),
        ("rounds=1.0", "rounds must be a whole number, 1 or more; got '1.0'"),
        ("fast=1", "fast must be True or False"),
        ("base=c", "base must be one of 'a', 'b', 3; got 'c'"),
        ("seed=x", "seed must be a whole number, or None"),
        ("power=0.5", "m: power must be a number, one of 1, 0.75; got 0.5"),
        ("plain=inf", "plain must be a number; got inf"),
        ("what=1", "m has no option 'what'; its options: share=0.5"),
        ("share", "-o 'share': write name=value"),
    ],
)
def test_a_wrong_pair_says_what_is_allowed(pair, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        read_options(option_types(many, 2), [pair], "m", "-o")
    assert message in str(error.value)


def test_the_command_lists_the_only_values_of_a_number(command):
    code, printed, errors = command("methods")
    assert code == 0, errors
    assert any(row.split("│")[2:5] == ["a", "1.0", "a number, one of 1, 0.75, 0.5"] for row in _rows(printed))


def _rows(printed):
    return ["│".join(cell.strip() for cell in line.split("│")) for line in printed.splitlines()]


def test_an_option_given_twice_is_refused():
    with pytest.raises(ValueError, match="rounds is given twice"):
        read_options(option_types(many, 2), ["rounds=1", "rounds=2"], "m", "-o")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ria", {"a": "x"}, "method 'ria': a must be a number; got 'x'"),
        ("ria", {"a": float("nan")}, "a must be a number; got nan"),
        ("ria", {"a": True}, "a must be a number; got True"),
        ("dass", {"alpha": "x"}, "alpha must be a number"),
        ("ace", {"power": float("inf")}, "power must be a number"),
        ("ace", {"eps": "x"}, "eps must be a number, above 0 and below 1"),
        ("varp", {"eps": 1}, "eps must be a number, above 0 and below 1; got 1"),
        ("ace", {"sign": 1.0}, "sign must be one of 1, -1; got 1.0"),
        ("cosp", {"prefactor": 3}, "prefactor must be one of 'none', 'relative', 'wanda', 'ria', or None; got 3"),
        ("sparsegpt", {"block_size": "x"}, "block_size must be a whole number, 1 or more"),
        ("sparsegpt", {"block_size": 0}, "block_size must be a whole number, 1 or more; got 0"),
        ("sparsegpt", {"damping": -1.0}, "damping must be a number, 0 or more"),
    ],
)
def test_every_method_checks_its_options_first(method, options, message):
    layer = torch.nn.Linear(8, 4)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="method") as error:
        prune_linear(layer, torch.randn(20, 8), method, **options)
    assert message in str(error.value)
    assert torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match="method"):
        prune_model(None, None, method, **options)


def test_numbers_of_numpy_and_whole_numbers_are_numbers():
    np = pytest.importorskip("numpy")
    assert metric("ria").complete({"a": np.float32(0.25)}) == {"a": 0.25}
    assert metric("ria").complete({"a": 1}) == {"a": 1}
    assert metric("sparsegpt").complete({"block_size": np.int64(64)})["block_size"] == 64


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"kind": "lstsq", "damping": "x"}, "damping must be a number, 0 or more; got 'x'"),
        ({"kind": "lstsq", "rounds": 2}, "has no option 'rounds'; its options: damping=0.02"),
        ({"kind": "obs"}, "one of rescale, lstsq, or None; got 'obs'"),
        ({"damping": 0.1}, 'a dict with a "kind"'),
        (3, "got 3"),
        (Update, "an ace_triton.Update"),
    ],
)
def test_an_invalid_update_is_explained(update, message):
    with pytest.raises(ValueError, match="update") as error:
        prune_linear(torch.nn.Linear(8, 4), torch.randn(20, 8), "wanda", update=update)
    assert message in str(error.value)


def test_a_dict_is_an_update():
    assert Update.of({"kind": "lstsq", "damping": 0.1}) == Update("lstsq", damping=0.1)
    assert Update.of(Update(mask_rounds=2).to_dict()) == Update(mask_rounds=2)
    with pytest.raises(ValueError, match="damping must be a number, 0 or more; got nan"):
        Update(damping=float("nan"))


@pytest.mark.parametrize("update", [None, "rescale", "lstsq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_metric_may_return_the_scores_themselves(register, update, dtype):
    torch.manual_seed(0)
    scores = torch.rand(16, 32)

    @register("hand_made")
    def hand_made(weight, stats):
        return scores.to(weight.dtype)

    rounded = scores.to(torch.float32 if dtype == torch.float64 else dtype).float()
    best = rounded.reshape(16, 8, 4).topk(2, dim=-1).indices
    by_hand = torch.zeros(16, 8, 4, dtype=torch.bool).scatter_(-1, best, True).reshape(16, 32)
    layer, tokens = torch.nn.Linear(32, 16, dtype=dtype), torch.randn(100, 32)
    dense = layer.weight.detach().clone()
    result = prune_linear(layer, tokens, "hand_made", update=update, return_mask=True)
    unequal = (result.mask != by_hand).reshape(16, 8, 4).any(-1)
    ties = torch.tensor([[len(group.unique()) < 4 for group in row] for row in rounded.reshape(16, 8, 4)])
    assert not bool((unequal & ~ties).any())
    assert torch.equal(layer.weight != 0, result.mask)
    if update is None:
        assert torch.equal(layer.weight, dense.where(result.mask, 0.0))


def test_scores_of_ones_own_work_for_rows_and_outputs(register):
    scores = torch.rand(16, 32, generator=torch.Generator().manual_seed(0))

    @register("hand_made")
    def hand_made(weight, stats):
        return scores

    def mask(sparsity):
        return prune_linear(torch.nn.Linear(32, 16), torch.randn(9, 32), "hand_made", sparsity, return_mask=True).mask

    from ace_triton import Sparsity

    assert torch.equal(mask(0.5), select_rows(scores.clone(), ScoreTerms(), 16, output="mask"))
    assert torch.equal(mask("2:4"), select_nm(scores.clone(), ScoreTerms(), 2, 4, output="mask"))
    along = Sparsity("2:4", axis="out")
    assert torch.equal(mask(along), select_nm(scores.clone(), ScoreTerms(), 2, 4, axis="out", output="mask"))


def test_a_model_is_pruned_and_permuted_by_scores_of_ones_own(register, make_decoder, ids):
    @register("wanda_by_hand")
    def wanda_by_hand(weight, stats):
        return weight.abs() * stats.norm

    by_hand, model = make_decoder("llama"), make_decoder("llama")
    prune_model(by_hand, ids, "wanda_by_hand", permute=True)
    prune_model(model, ids, "wanda", permute=True)
    for (name, ours), theirs in zip(by_hand.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda weight: None, "returned a NoneType; return an ace_triton.ScoreTerms"),
        (lambda weight: weight[0], r"returned scores of shape \(8,\)"),
        (lambda weight: -weight.abs(), "scores must be finite and 0 or more"),
        (lambda weight: weight.abs() / 0, "scores must be finite and 0 or more"),
    ],
)
def test_invalid_scores_are_refused(register, returned, message):
    register("broken")(lambda weight, stats: returned(weight))
    layer = torch.nn.Linear(8, 4)
    before = layer.weight.detach().clone()
    with pytest.raises(PruneError, match=message):
        prune_linear(layer, torch.randn(20, 8), "broken", name="q_proj")
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("function", [prune_linear, prune_model])
def test_options_named_like_an_argument_are_refused(register, function):
    names = set(inspect.signature(function).parameters) - {"options"}
    for name in names:
        source = f"lambda w, s, {name}=1: None"
        with pytest.raises(ValueError, match=f"option '{name}' has the name of an argument"):
            register("shadow")(eval(source))
    assert "shadow" not in _REGISTRY


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda w, s, a: None, "option 'a' has no default"),
        (lambda w, s, **options: None, "name each option instead"),
        (lambda w: None, "takes 1 arguments; it must take 2"),
    ],
)
def test_a_metric_whose_options_cannot_be_passed_is_refused(register, function, message):
    with pytest.raises(ValueError, match=message):
        register("odd")(function)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (lambda: [[1.0] * 8], "got a list"),
        (lambda: torch.randn(20, 8).to_sparse(), "must be a plain dense tensor"),
        (lambda: torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)]), "must be a plain dense tensor"),
        (
            lambda: torch.randn(20, 8).bfloat16(),
            r"in torch\.float32, on the tokens, which are torch\.bf",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_invalid_tokens_are_explained(tokens, message):
    with pytest.raises(StatsError, match=message):
        prune_linear(torch.nn.Linear(8, 4), tokens(), "ace")
