"""VarP outside its assumption: input norms of three kinds of models, and the error of each metric there.

    python -m benchmarks.reports.norms --encoder FOLDER --decoder MODEL --text TEXT

Writes docs/norms.{json,md}. VarP's series, (1 - y)^-1, needs squared norms y of a channel over a sequence below 1.
The vision transformer is that of benchmarks.reports.vision, trained here.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from ace_triton import ActivationStats, prune_linear
from ace_triton.commands.report import write_json
from ace_triton.decoders.batches import Batch, run_model
from ace_triton.decoders.blocks import find_blocks, linears_of
from ace_triton.formats.registry import load_model
from ace_triton.inputs.calibration import load_calibration
from ace_triton.inputs.masked_text import pad_of, padded, pieces_of
from ace_triton.inputs.text import read_documents
from ace_triton.kernels.variance_factor import variance_factor

from . import vision
from .machines import processor

SEQUENCES, LENGTH = 16, 64
MOST_LAYERS = 24
"""Layers of a model that are measured, evenly spread over its depth."""

PATTERN = "2:4"
METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "ria": ("ria", {}),
    "varp, base ria, max_layer": ("varp", {}),
    "varp, base ria, max_sequence": ("varp", {"norm": "max_sequence"}),
    "varp, base ria, frobenius": ("varp", {"norm": "frobenius"}),
    "varp, base ria, frobenius, divided": ("varp", {"norm": "frobenius", "sign": -1}),
    "varp, base wanda, max_layer": ("varp", {"base": "wanda"}),
    "cosp": ("cosp", {}),
    "ace": ("ace", {}),
    "ace-paper": ("ace-paper", {}),
}
NEAR_POLE = 10.0
console = Console()

Tokens = tuple[torch.Tensor, torch.Tensor | None]
"""The input of a layer [n_sequences, length, in_features] and its padding mask."""


@torch.no_grad()
def inputs_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[tuple[str, nn.Module, Tokens]]:
    """The measured layers of a model's blocks, each with what it reads."""
    layers = [entry for block in find_blocks(model, Batch(inputs)) for entry in linears_of(block.module, block.name)]
    step = max(1, -(-len(layers) // MOST_LAYERS))
    chosen = layers[::step] if len(layers) % step else layers[step // 2 :: step]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, args, name=name: seen.update({name: args[0].detach()}))
        for name, layer in chosen
    ]
    run_model(model, Batch(inputs))
    for hook in hooks:
        hook.remove()
    mask = inputs.get("attention_mask")
    valid = None if mask is None else mask.bool()
    return [(name, layer, (seen[name], valid)) for name, layer in chosen if name in seen]


def measure(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Norms of the inputs of a model's layers, and each metric's error."""
    above, near, outliers = [], [], []
    errors: dict[str, list[float]] = {name: [] for name in METRICS}
    for _, layer, (tokens, valid) in inputs_of(model, inputs):
        stats = ActivationStats.from_tokens(tokens, valid=valid)
        square = stats.sequence_square
        above.append(float((square > 1).float().mean()))
        norm = stats.norm
        outliers.append(float(norm.max() / norm.median().clamp_min(1e-12)))
        near.append(float((variance_factor(square, "max_layer", 1.0, 0.01) >= NEAR_POLE).float().mean()))
        for name, (method, options) in METRICS.items():
            errors[name].append(error_of(layer, tokens, valid, method, options))
    return {
        "layers": len(above),
        "above": statistics.mean(above),
        "outliers": statistics.median(outliers),
        "near_pole": statistics.mean(near),
        "errors": {name: statistics.mean(found) for name, found in errors.items()},
    }


def error_of(
    layer: nn.Module, tokens: torch.Tensor, valid: torch.Tensor | None, method: str, options: dict[str, Any]
) -> float:
    """Squared error of a pruned layer's outputs, over the squared outputs; without padding."""
    pruned = copy.deepcopy(layer)
    reduce = "abs" if method == "ace-paper" else None
    stats = ActivationStats.from_tokens(tokens, layer=layer, valid=valid, reduce=reduce)
    prune_linear(pruned, None if method == "magnitude" else stats, method, PATTERN, **options)
    rows = tokens.reshape(-1, tokens.shape[-1]) if valid is None else tokens[valid]
    with torch.no_grad():
        bias = getattr(layer, "bias", None)
        wanted = layer(rows) - (0 if bias is None else bias)
        return float((pruned(rows) - layer(rows)).square().sum() / wanted.square().sum())


def main(
    encoder: Annotated[str, typer.Option(help="Folder of a sentence encoder.")],
    decoder: Annotated[str, typer.Option(help="A causal language model.")],
    text: Annotated[str, typer.Option(help="Text that both read.")],
    out: Annotated[Path, typer.Option(help="Where to write, without the suffix.")] = Path("docs/norms"),
) -> None:
    """Measure each kind of model; write OUT.json and OUT.md."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}

    def add(kind: str, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        found[kind] = measure(model.eval(), inputs)
        console.print(kind, found[kind], highlight=False)

    digits, small = vision.Digits.load(), vision.untrained()
    vision.train(small, digits, vision.EPOCHS, vision.RATE, keeps_zeros=False)
    add("vision transformer, digits", small, {"pixel_values": digits.images[:SEQUENCES]})
    model, companions = load_model(encoder, task="embedding", dtype=torch.float32)
    pieces = pieces_of(read_documents(text), companions.tokenizer, SEQUENCES, LENGTH, 0)
    add(f"encoder, {Path(encoder).name}", model, padded(pieces, pad_of(companions.tokenizer)))
    model, tokenizer = load_model(decoder, dtype=torch.float32)
    ids = load_calibration(text, tokenizer, samples=SEQUENCES, length=LENGTH).ids
    add(f"decoder, {Path(decoder).name}", model, {"input_ids": ids})
    setting = {"text": Path(text).name, "processor": processor(), "torch": torch.__version__}
    write_json(out.with_suffix(".json"), {"setting": setting, "kinds": found})
    out.with_suffix(".md").write_text("\n".join(page(setting, found)) + "\n")


def page(setting: dict[str, Any], kinds: dict[str, dict[str, Any]]) -> list[str]:
    """docs/norms.md."""
    names = list(kinds)
    return [
        "# VarP where input norms are above 1",
        "",
        "VarP multiplies a score by f = mean of 1 / (1 - y), with y the squared norm of an input channel over a "
        "sequence. The series behind it needs y below 1. The package divides y by a level first (`norm`), and limits "
        "it to 0.99. This page says how far real inputs are from the assumption, and what the factor does there.",
        "",
        f"Measured by `make norms` on an {setting['processor']}, torch {setting['torch']}: dense models, {SEQUENCES} "
        f"sequences of at most {LENGTH} tokens of {setting['text']} or {SEQUENCES} images, up to {MOST_LAYERS} linear "
        "layers of each model.",
        "",
        f"| | {' | '.join(names)} |",
        "|---" + "|---:" * len(names) + "|",
        _row("layers measured", [f"{kinds[name]['layers']}" for name in names]),
        _row("squared norms above 1", [f"{kinds[name]['above']:.1%}" for name in names]),
        _row("largest channel norm over the median", [f"{kinds[name]['outliers']:.1f}" for name in names]),
        _row("channels with f of 10 or more (max_layer)", [f"{kinds[name]['near_pole']:.1%}" for name in names]),
        "",
        f"Error of a layer's outputs at {PATTERN}: squared error over squared outputs, mean over the layers, without a "
        "fit. The same sequences choose the masks and measure the error.",
        "",
        f"| metric | {' | '.join(names)} |",
        "|---" + "|---:" * len(names) + "|",
        *(_row(metric, [f"{kinds[name]['errors'][metric]:.4f}" for name in names]) for metric in METRICS),
        "",
        *answers(kinds),
    ]


def answers(kinds: dict[str, dict[str, Any]]) -> Sequence[str]:
    """What the table says of VarP beside its base and Wanda, one line per kind of model."""
    lines = []
    for name, found in kinds.items():
        errors = found["errors"]
        varied = {metric: error for metric, error in errors.items() if metric.startswith("varp")}
        best = min(varied, key=lambda metric: varied[metric])
        against = [f"{errors[best] / errors[metric] - 1:+.1%} to {metric}" for metric in ("ria", "wanda")]
        usual = errors["varp, base ria, max_layer"] / errors["ria"] - 1
        lines.append(
            f"- {name}: {found['above']:.0%} of the squared norms are outside the assumption. VarP with its defaults "
            f"changes the error by {usual:+.1%} to its base, ria. Its best form is {best} ({', '.join(against)}). ACE: "
            f"{errors['ace'] / errors['wanda'] - 1:+.1%} to wanda, as published "
            f"{errors['ace-paper'] / errors['wanda'] - 1:+.1%}."
        )
    return lines


def _row(what: str, cells: Sequence[str]) -> str:
    return f"| {what} | {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
