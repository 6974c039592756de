"""Rotating the values of attention heads keeps the model's function, and a pattern prunes less importance."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ace_triton import Recipe, prune_model
from ace_triton.decoders.batches import Batch
from ace_triton.decoders.blocks import find_blocks
from ace_triton.errors import ArgumentError, RecipeError
from ace_triton.linears import linear_weight
from ace_triton.reordering.fold import Fold
from ace_triton.reordering.reorder import Folds, find_folds
from ace_triton.reordering.rotation import OutputSide, ValueSide, learned_rotation
from ace_triton.reordering.trial import ROTATIONS
from ace_triton.sparsity import Sparsity

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "opt", "qwen3_moe")


def folds_of(model: nn.Module, ids: torch.Tensor) -> Folds:
    batch, blocks = Batch.of_ids(ids[:2, :8]), find_blocks(model)
    return find_folds(model, blocks, batch, 1, wanted=lambda _: True, shared=lambda _: False, trial=ROTATIONS)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def random_rotation(fold: Fold) -> torch.Tensor:
    return ROTATIONS.draw(fold, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_model_computes_the_same(make_decoder, ids, family):
    """With random rotations and random biases; the trial restores every bit."""
    model, dense = make_decoder(family), make_decoder(family)
    model, dense = (m if family == "qwen3_moe" else m.double() for m in (model, dense))
    with torch.no_grad():
        for each in (model, dense):
            for name, parameter in each.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(generator=torch.Generator().manual_seed(1))
    folds = folds_of(model, ids)
    assert {name.rpartition(".")[2] for name in folds.proven} == {"out_proj" if family == "opt" else "o_proj"}
    assert len(folds.proven) == 3
    assert not folds.unfolded
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), f"{name} was not restored"
    for fold in folds.proven.values():
        fold.rotate(folds.layers, random_rotation(fold))
        for name in (fold.consumer, *fold.producers):
            assert not torch.equal(linear_weight(folds.layers[name]), linear_weight(dense.get_submodule(name)))
    expected, error = logits(dense, ids), logits(model, ids) - logits(dense, ids)
    assert float(error.norm()) <= 10 * torch.finfo(model.dtype).eps * float(expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_in_half_precision_is_not_taken_for_a_change(make_decoder, ids, dtype):
    assert len(folds_of(make_decoder("llama").to(dtype), ids).proven) == 3


def test_an_operation_on_single_channels_is_detected(make_decoder, ids):
    """Channels may be reordered through it, but not rotated."""
    model = make_decoder("llama")
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _m, _a, out: nn.functional.silu(out))
    folds = folds_of(model, ids)
    assert [u.name for u in folds.unfolded] == ["model.layers.1.self_attn.o_proj"]
    assert "more than add values up" in folds.unfolded[0].reason
    report = prune_model(model, ids, "wanda", rotate=True)
    assert [r.name for r in report.rotation.rotated] == [f"model.layers.{i}.self_attn.o_proj" for i in (0, 2)]
    assert report.rotation.unrotated == folds.unfolded


def sides_of(sparsity: Sparsity) -> tuple[list[OutputSide | ValueSide], SimpleNamespace]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tokens = draw(2, 3, 20, 8)
    gram = tokens.transpose(2, 3) @ tokens
    drawn = SimpleNamespace(outputs=draw(16, 2, 3, 8), values=draw(2, 8, 12), gram=gram, squares=draw(12).square())
    sides = [OutputSide(drawn.outputs, gram, sparsity), ValueSide(drawn.values, drawn.squares, sparsity)]
    return sides, drawn


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_the_loss_is_the_pruned_importance_and_its_gradient_is_exact(pattern):
    sides, drawn = sides_of(Sparsity.of(pattern))
    fold = Fold("o", ("v",), pools=2, shares=3, width=8)
    rotation = random_rotation(fold).float().requires_grad_()
    outputs = torch.einsum("opsd,pde->opse", drawn.outputs, rotation)
    energy = torch.einsum("pde,psdf,pfe->pse", rotation, drawn.gram, rotation)
    values = torch.einsum("pde,pdi->pei", rotation, drawn.values)
    for side, importance in zip(
        sides, ((outputs.square() * energy).flatten(1), (values.square() * drawn.squares).flatten(0, 1)), strict=True
    ):
        groups = importance.unflatten(1, (-1, 4)) if pattern == "2:4" else importance[:, None]
        pruned = groups.sort(2).values[:, :, : groups.shape[2] // 2].sum()
        (gradient,) = torch.autograd.grad(pruned, rotation, retain_graph=True)
        found = side.loss(rotation.detach())
        torch.testing.assert_close(found.pruned, pruned.detach())
        torch.testing.assert_close(found.total, importance.detach().sum())
        torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sparsity", ["2:4", 0.5, Sparsity("2:4", axis="out")], ids=str)
def test_a_learned_rotation_is_orthogonal_and_retains_more(sparsity):
    sparsity = Sparsity.of(sparsity)
    sides, _ = sides_of(sparsity)
    found = learned_rotation(sides, 2, 8)
    torch.testing.assert_close(found.matrix @ found.matrix.mT, torch.eye(8, dtype=torch.float64).expand(2, 8, 8))
    losses = [side.loss(found.matrix.float()) for side in sides]
    assert found.after == pytest.approx(1 - float(sum(loss.pruned / loss.total for loss in losses)) / 2, abs=1e-5)
    assert found.after > found.before + 0.01


@pytest.mark.parametrize(
    "options", [{"update": "lstsq", "permute": True}, {"sequential": "layers"}, {"sparsity": 0.5, "method": "ace"}]
)
def test_pruning_with_rotation_is_pruning_of_the_rotated_model(make_decoder, ids, options):
    """Fold in what pruning found, and prune without rotation: the first block is the same up to rounding."""
    model, dense = make_decoder("qwen2"), make_decoder("qwen2")
    options = {"method": "wanda", "include": "*.0.*", **options}
    learned = []
    original = Fold.rotate

    def recording(fold, layers, matrix):
        learned.append((fold, matrix))
        original(fold, layers, matrix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fold, "rotate", recording)
        report = prune_model(model, ids, rotate=True, **options)
    (rotated,) = report.rotation.rotated
    assert rotated.after > rotated.before
    fold, matrix = learned[-1]
    fold.rotate(folds_of(dense, ids).layers, matrix)
    prune_model(dense, ids, **options)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e18])
def test_weights_of_any_size_have_finite_results(make_decoder, ids, scale):
    model = make_decoder("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight *= scale
        model.model.layers[0].self_attn.o_proj.weight /= scale or 1
    rotated = prune_model(model, ids, "wanda", rotate=True, include="*.0.*").rotation.rotated[0]
    assert 0 < rotated.before <= rotated.after <= 1


def test_values_that_are_not_pruned_do_not_count(make_decoder, ids):
    report = prune_model(make_decoder("llama"), ids, "wanda", rotate=True, exclude="*.v_proj")
    assert [r.after > r.before for r in report.rotation.rotated] == [True] * 3


@pytest.mark.parametrize("options", [{}, {"include": "*.mlp.*"}])
def test_a_model_without_a_pair_is_refused_before_anything_changes(make_decoder, ids, options):
    family = "llama" if options else "gpt2"
    model, dense = make_decoder(family), make_decoder(family)
    with pytest.raises(ArgumentError, match=r"rotate: no output projection .*: leave rotate out"):
        prune_model(model, ids, "wanda", rotate=True, **options)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_does_not_go_together_is_refused():
    with pytest.raises(RecipeError, match="rotate learns from calibration tokens, and magnitude alone reads none"):
        Recipe("magnitude", rotate=True)
    with pytest.raises(RecipeError, match='sequential="none" runs each block only once'):
        Recipe("wanda", rotate=True, sequential="none")
    with pytest.raises(RecipeError, match="rotate must be True or False; got 1"):
        Recipe("wanda", rotate=1)
    assert Recipe.from_json(Recipe("wanda", rotate=True).to_json()) == Recipe("wanda", rotate=True)
    assert "rotate" not in Recipe("wanda").to_dict()
