"""What to fit a layer's weights to: its own dense outputs, or the dense model's; writes docs/targets.md.

    python -m benchmarks.reports.targets --calibration c4.jsonl.gz --held-out c4-heldout.jsonl.gz

After pruned blocks, a layer reads inputs x~ instead of the dense model's x. Its kept weights w can be fitted to its own
outputs W x~, or toward the dense model's outputs W x, to correct earlier errors:

    minimize sum_t |w x~_t - (1 - alpha) W x~_t - alpha W x_t|^2,   which needs X^T X~ besides the Gram matrix of x~.

All blocks before one block are pruned and updated. Four layers of that block are fitted for several alpha, and
evaluated on text that they were not fitted to.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton import Update, prune_model
from ace_triton.inputs import checkpoint
from ace_triton.inputs.calibration import load_calibration
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.solvers.least_squares import solve_kept

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
ALPHAS = (0.0, 0.25, 0.5, 1.0)

console = Console()


@dataclass(frozen=True)
class Fit:
    """A layer fitted with one alpha; errors and norms are relative.

    Attributes:
        layer, alpha: name of the layer, and the weight of the dense model's outputs.
        fitted, held_out: distance from the dense model's outputs, on the calibration text and on held-out text.
        own: distance from the layer's own dense outputs on its present inputs, on held-out text.
        norm: norm of its outputs over that of the dense model's, on held-out text.
    """

    layer: str
    alpha: float
    fitted: float
    held_out: float
    own: float
    norm: float


def main(
    calibration: Annotated[str, typer.Option()],
    held_out: Annotated[str, typer.Option()],
    block: Annotated[int, typer.Option()] = 12,
    samples: Annotated[int, typer.Option()] = 64,
    length: Annotated[int, typer.Option()] = 128,
    out: Annotated[Path, typer.Option()] = Path("docs/targets.md"),
) -> None:
    """Fit, evaluate and write the page."""
    torch.set_grad_enabled(False)
    dense, tokenizer = checkpoint.load(checkpoint.SMOLLM2)
    texts = [
        load_calibration(source, tokenizer, samples=samples, length=length).ids for source in (calibration, held_out)
    ]
    dense.model.layers = dense.model.layers[: block + 1]
    pruned = copy.deepcopy(dense)
    prune_model(pruned, texts[0], "wanda", "2:4", update="lstsq", exclude=f"model.layers.{block}.*")
    (fit, judge), (fit_pruned, judge_pruned) = (
        [inputs(model, block, ids) for ids in texts] for model in (dense, pruned)
    )
    lines, prior = [], Update()
    for name in LAYERS:
        weight = dense.model.layers[block].get_submodule(name).weight.float()
        x, moved = fit[name], fit_pruned[name]
        gram, cross = moved.t() @ moved, x.t() @ moved
        held = (prior.damping * gram.diagonal().mean() + prior.prior / len(x) * gram.diagonal()).diag()
        scale = gram.diagonal().sqrt().contiguous()
        mask = select_nm(weight, ScoreTerms(scale=scale), 2, 4, output="mask")
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + held))
        for alpha in ALPHAS:
            # The solution without a mask. Masked least squares from it, with the same Gram matrix, fits the target.
            target = weight @ ((1 - alpha) * gram + alpha * cross + held) @ inverse
            kept = solve_kept(target, mask, gram + held, 40, tolerance=1e-3)
            lines.append(evaluated(name, alpha, weight, kept, (x, moved), (judge[name], judge_pruned[name])))
            console.print(lines[-1], highlight=False)
    out.write_text(page(lines, block, samples, length))


def inputs(model: Any, block: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of the layers of a block, fp32 [n_tokens, in_features], by name."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in LAYERS}
    hooks = [
        model.model.layers[block]
        .get_submodule(name)
        .register_forward_hook(lambda _m, args, _out, name=name: seen[name].append(args[0].flatten(0, -2).float()))
        for name in LAYERS
    ]
    for part in ids.split(16):
        model.model(part, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def evaluated(
    layer: str,
    alpha: float,
    dense: torch.Tensor,
    kept: torch.Tensor,
    fit: tuple[torch.Tensor, torch.Tensor],
    judge: tuple[torch.Tensor, torch.Tensor],
) -> Fit:
    """Errors of ``kept``; inputs are pairs, of the dense model and of the model with pruned blocks."""

    def distance(inputs: torch.Tensor, dense_inputs: torch.Tensor) -> float:
        wanted = dense_inputs @ dense.t()
        return float((inputs @ kept.t() - wanted).norm() / wanted.norm())

    norm = float((judge[1] @ kept.t()).norm() / (judge[0] @ dense.t()).norm())
    return Fit(layer, alpha, distance(fit[1], fit[0]), distance(judge[1], judge[0]), distance(judge[1], judge[1]), norm)


def page(fits: list[Fit], block: int, samples: int, length: int) -> str:
    """docs/targets.md."""
    head = [
        "# What to fit a layer's weights to",
        "",
        "Measured on a CPU by `python -m benchmarks.reports.targets`. SmolLM2-135M-Instruct: all blocks before block "
        f"{block} are pruned to 2:4 by Wanda, with masked least squares. The layers of block {block} are fitted on "
        f"{samples} x {length} tokens of C4 to (1 - alpha) times their own dense outputs plus alpha times the dense "
        "model's. Errors are relative norms.",
        "",
        "| layer | alpha | error against the dense model's outputs: calibration | held out "
        "| error against its own dense outputs: held out | norm of outputs over the dense model's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = [
        f"| {f.layer} | {f.alpha:g} | {f.fitted:.3f} | {f.held_out:.3f} | {f.own:.3f} | {f.norm:.3f} |" for f in fits
    ]
    tail = [
        "",
        "A fit to the dense model's outputs regresses on inputs that already contain much error. The layer's outputs "
        "shrink, which accumulates over the blocks. Part of the gain on the calibration text is lost on held-out text, "
        "and the layer moves away from its own function. So `prune_model` fits to a layer's own outputs.",
    ]
    return "\n".join(head + rows + tail) + "\n"


if __name__ == "__main__":
    typer.run(main)
