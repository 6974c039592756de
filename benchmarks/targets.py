"""What a layer's weights should be fitted to: its own dense outputs, or the dense model's; writes docs/targets.md.

    python -m benchmarks.targets --calibration c4.jsonl.gz --held-out c4-heldout.jsonl.gz

Behind pruned blocks a layer sees inputs x~ where the dense model has x. Its kept weights w can be fitted to its own
outputs W x~, or drawn towards the dense model's, W x, so as to make good what went wrong before:

    minimise sum_t |w x~_t - (1 - alpha) W x~_t - alpha W x_t|^2,   solved with X^T X~ beside the Gram matrix of x~.

All blocks before one are pruned and updated; four layers of that one are fitted for several alpha, and judged on text
they were not fitted to.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton import Update, checkpoint, prune_model
from ace_triton.calibration import load_calibration
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.least_squares import solve_kept

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
ALPHAS = (0.0, 0.25, 0.5, 1.0)

console = Console()


@dataclass(frozen=True)
class Fit:
    """A layer fitted with one alpha; errors and norms are relative to the outputs that are named.

    Attributes:
        layer, alpha: which.
        fitted, held_out: distance from the dense model's outputs, on the calibration text and on other text.
        own: distance from the layer's own dense outputs on the inputs it has, on other text.
        norm: norm of its outputs over that of the dense model's, on other text.
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
    """Fit, judge and write the table."""
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
            # The free solution: with the same Gram matrix, masked least squares from it is that of the target.
            target = weight @ ((1 - alpha) * gram + alpha * cross + held) @ inverse
            kept = solve_kept(target, mask, gram + held, 40, tolerance=1e-3)
            lines.append(judged(name, alpha, weight, kept, (x, moved), (judge[name], judge_pruned[name])))
            console.print(lines[-1], highlight=False)
    out.write_text(page(lines, block, samples, length))


def inputs(model: Any, block: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the layers of a block read, fp32 [n_tokens, in_features] by name."""
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


def judged(
    layer: str,
    alpha: float,
    dense: torch.Tensor,
    kept: torch.Tensor,
    fit: tuple[torch.Tensor, torch.Tensor],
    judge: tuple[torch.Tensor, torch.Tensor],
) -> Fit:
    """Errors of ``kept``; inputs come in pairs, the dense model's and those behind pruned blocks."""

    def distance(inputs: torch.Tensor, dense_inputs: torch.Tensor) -> float:
        wanted = dense_inputs @ dense.t()
        return float((inputs @ kept.t() - wanted).norm() / wanted.norm())

    norm = float((judge[1] @ kept.t()).norm() / (judge[0] @ dense.t()).norm())
    return Fit(layer, alpha, distance(fit[1], fit[0]), distance(judge[1], judge[0]), distance(judge[1], judge[1]), norm)


def page(fits: list[Fit], block: int, samples: int, length: int) -> str:
    """The table as markdown."""
    head = [
        "# What to fit a layer's weights to",
        "",
        "Measured on a CPU by `python -m benchmarks.targets`. SmolLM2-135M-Instruct, 2:4 by Wanda with masked least "
        f"squares in all blocks before block {block}; its layers fitted on {samples} x {length} tokens of C4 to "
        "(1 - alpha) times their own dense outputs plus alpha times the dense model's. Errors are relative norms.",
        "",
        "| layer | alpha | to the dense model's outputs: calibration | held out | to its own dense outputs: held out "
        "| norm of outputs over the dense model's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = [
        f"| {f.layer} | {f.alpha:g} | {f.fitted:.3f} | {f.held_out:.3f} | {f.own:.3f} | {f.norm:.3f} |" for f in fits
    ]
    tail = [
        "",
        "Drawn towards the dense model's outputs, a layer regresses on inputs that are to a good part error by then. "
        "Its outputs shrink, which adds up over the blocks; part of what the fit gains on the calibration text is gone "
        "on other text; and the layer moves away from its own function. `prune_model` fits to a layer's own outputs.",
    ]
    return "\n".join(head + rows + tail) + "\n"


if __name__ == "__main__":
    typer.run(main)
