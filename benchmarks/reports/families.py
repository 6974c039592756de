"""Which families of transformers' causal decoders are pruned: a small random model of each; writes docs/families.md.

    python -m benchmarks.reports.families

A family counts as pruned if every layer of its report has at most two of every four weights left, its account adds up
to all matrices of its blocks, and the model still gives finite logits.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ace_triton import ModelReport, prune_model
from ace_triton.decoders.blocks import find_blocks, linears_of
from ace_triton.linears import linear_weight
from ace_triton.model_report import LayerReport

from ..harness.small_models import NotMade, small_model

NOT_JUDGED = {
    "gemma3n": "its vision tower needs the package timm; its text decoder is gemma3n_text",
    "gemma4_assistant": "a drafter, which reads hidden states and keys of another model",
    "gemma4_unified_assistant": "a drafter, which reads hidden states and keys of another model",
    "musicgen": "AutoModelForCausalLM makes no model from its configuration, which is an encoder-decoder's",
    "musicgen_melody": "AutoModelForCausalLM makes no model from its configuration, which is an encoder-decoder's",
}
"""Families of which no small model is made, and why not."""

MOST = 0.95
"""Families with a smaller share of their blocks' matrices pruned are listed with their shares."""

FAMILIES = Path("docs/families.md")
console = Console()


@dataclass(frozen=True)
class Counts:
    """Numbers of families on the page."""

    pruned: int
    not_pruned: int
    not_judged: int

    @classmethod
    def of_page(cls, path: Path) -> Counts:
        """The numbers of a page that :func:`page` wrote."""
        found = dict(re.findall(r"^- \*\*(.+?)\*\* \((\d+)\)", path.read_text(encoding="utf-8"), re.MULTILINE))
        pruned = sum(int(count) for title, count in found.items() if title.startswith("Pruned"))
        return cls(pruned, int(found["Not pruned"]), int(found["Not judged"]))


@dataclass(frozen=True)
class Family:
    """What became of one.

    Attributes:
        name: the family's name.
        layers: pruned.
        dense: why others stayed dense.
        whole: True if the whole model was run for each block.
        pruned: share of the blocks' matrices.
        outside: share of the decoder's linear layers, the head apart, that lies outside the blocks.
        error: what stopped it.
    """

    name: str
    layers: int = 0
    dense: tuple[str, ...] = ()
    whole: bool = False
    pruned: float = 0.0
    outside: float = 0.0
    error: str | None = None


def judged(name: str, model: PreTrainedModel, ids: torch.Tensor, options: dict[str, Any]) -> Family:
    """Prune the model, and look at what is left of it."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            matrices = _block_matrices(model)
            report = prune_model(model, ids, batch_size=4, **options)
        with torch.no_grad():
            finite = bool(model(input_ids=ids, use_cache=False).logits.isfinite().all())
        wrong = [layer.name for layer in report.layers if not two_of_four(model, layer)]
        error = None if finite and not wrong else f"not finite, or not 2:4: {wrong}"
        error = error or _misses(report, matrices)
    except Exception as problem:
        return Family(name, error=f"{type(problem).__name__}: {problem}")
    whole = any("the whole model is run" in str(warning.message) for warning in caught)
    dense = {re.sub(r"tied to .*", "tied to another layer's", skipped.reason) for skipped in report.skipped}
    pruned, outside = report.account.share("pruned"), _share_outside(model)
    return Family(name, len(report.layers), tuple(sorted(dense)), whole, pruned, outside, error)


def _block_matrices(model: PreTrainedModel) -> int:
    """Elements of all parameters of the blocks with more than one row and column, and of linear layers with one."""
    parameters = {}
    for block in find_blocks(model):
        linears = {layer.weight for _, layer in linears_of(block.module)}
        for name, parameter in block.module.named_parameters():
            wide = sum(size > 1 for size in parameter.shape) > 1 and "bias" not in name.rpartition(".")[2]
            if wide or parameter in linears:
                parameters[parameter] = parameter.numel()
    return sum(parameters.values())


def _misses(report: ModelReport, matrices: int) -> str | None:
    """What is wrong with the account, or None."""
    account = report.account
    if account.pruned != sum(layer.parameters for layer in report.layers):
        return f"the layers of the report have other weights than its account: {account}"
    if account.blocks != matrices or account.pruned + account.skipped + account.excluded != matrices:
        return f"the account misses some of the {matrices:,} weights of the blocks: {account}"
    return None


def two_of_four(model: PreTrainedModel, layer: LayerReport) -> bool:
    """True if a layer, or an expert of a stack in either layout, has at most two of every four weights left."""
    module = dict(model.named_modules()).get(layer.name)
    weight = None if module is None else linear_weight(module)
    if weight is not None:
        return _fits(weight if layer.axis == "in" else weight.t())
    experts, index, matrix = layer.name.rsplit(".", 2)
    stack = model.get_parameter(f"{experts}.{matrix}").detach()
    rows = layer.parameters // stack.shape[-1]
    expert = stack.reshape(-1, rows, stack.shape[-1])[int(index)]
    return _fits(expert) or _fits(expert.t())


def _fits(lines: torch.Tensor) -> bool:
    return bool(lines.shape[1] % 4 == 0 and ((lines.reshape(len(lines), -1, 4) != 0).sum(-1) <= 2).all())


def _share_outside(model: PreTrainedModel) -> float:
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    inside = {layer for block in find_blocks(model) for _, layer in linears_of(block.module)}
    sizes = {layer: layer.weight.numel() for _, layer in linears_of(decoder) if layer is not head}
    return sum(size for layer, size in sizes.items() if layer not in inside) / max(sum(sizes.values()), 1)


def page(families: Sequence[Family], not_made: Mapping[str, str], options: dict[str, Any]) -> Iterator[str]:
    """The document."""
    asked = ", ".join(f"{key}={value!r}" for key, value in options.items())
    pruned = [family for family in families if family.error is None]
    yield "# Families\n"
    yield (
        f"Written by `make families`: a small random model of every family of causal decoders in transformers "
        f"{transformers.__version__}, pruned on random tokens by `prune_model(model, ids, {asked})`. Counted as "
        "pruned: at most two of every four weights left in every layer of the report, an account of pruned, skipped "
        "and excluded weights that adds up to all matrices of the blocks, and finite logits. In a model with several "
        "towers the text decoder is pruned. A real checkpoint may still differ from a small one. "
        "[Other classes of models](architectures.md), with the counts of all classes, have a page of their own.\n"
    )
    yield _line("Pruned, block by block", [f for f in pruned if not f.whole])
    yield _line("Pruned, the whole model run for each block", [f for f in pruned if f.whole])
    yield _line("Not pruned", [f for f in families if f.error is not None])
    yield f"- **Not judged** ({len(not_made)}): {', '.join(not_made) or 'none'}.\n"
    for name, reason in not_made.items():
        yield f"{name}: {reason}.\n"
    for family in families:
        if family.error is not None:
            yield f"{family.name}: {family.error}\n"
    yield "| left dense in places because | families |"
    yield "|---|---|"
    for reason in sorted({reason for family in pruned for reason in family.dense}):
        yield f"| {reason} | {', '.join(f.name for f in pruned if reason in f.dense)} |"
    yield (
        f"\nFamilies with less than {MOST:.0%} of their blocks' matrices pruned, or with more than {1 - MOST:.0%} of "
        "their decoder's linear layers (the head apart) outside the blocks. Shares are those of the small models.\n"
    )
    yield "| family | pruned, of the blocks' matrices | linear layers outside the blocks |"
    yield "|---|---|---|"
    for family in pruned:
        if family.pruned < MOST or family.outside > 1 - MOST:
            yield f"| {family.name} | {family.pruned:.1%} | {family.outside:.1%} |"


def _line(what: str, families: Sequence[Family]) -> str:
    return f"- **{what}** ({len(families)}): {', '.join(family.name for family in families) or 'none'}."


def main(
    only: Annotated[list[str] | None, typer.Option(help="Families to try; default: all.")] = None,
    method: Annotated[str, typer.Option()] = "ace",
    output: Annotated[Path, typer.Option()] = FAMILIES,
) -> None:
    """Try every family; write the document."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    ids = torch.randint(3, 101, (6, 16), generator=torch.Generator().manual_seed(1))
    options = {"method": method, "sparsity": "2:4", "permute": True, "update": "rescale"}
    families: list[Family] = []
    not_made: dict[str, str] = {}
    for name in track(only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "families", console=console):
        made = NotMade(NOT_JUDGED[name]) if name in NOT_JUDGED else small_model(name, ids)
        if isinstance(made, NotMade):
            not_made[name] = made.reason
        else:
            families.append(judged(name, made, ids, options))
    text = "\n".join(page(families, not_made, options))
    output.write_text(f"{text}\n", encoding="utf-8")
    console.print(f"{sum(f.error is None for f in families)} of {len(families)} pruned; written to {output}")


if __name__ == "__main__":
    typer.run(main)
