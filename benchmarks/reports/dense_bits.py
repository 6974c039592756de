"""Perplexity of dense models with 8 or 4 bits in the head or everywhere; adds to docs/quantization.{json,md}.

    python -m benchmarks.reports.dense_bits --evaluation wiki.test.raw.gz --model smollm2 --name SmolLM2-135M

The weights are those that ``ace-triton pack --head-bits --dense-bits`` stores. One more form keeps its weights and has
the inputs of its linear layers in 8 bits with a scale for every 32, as llama.cpp multiplies. Results in
docs/quantization.json are reused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from ace_triton.commands.report import write_json
from ace_triton.kernels.few_bits import dequantized_groups, largest_of_groups, quantized_groups
from ace_triton.kernels.packed_dense import dequantize_dense, quantize_dense
from ace_triton.packed.tables import tables_of
from ace_triton.solvers.quantize import GROUP
from ace_triton.study.workbench import Protocol, Workbench, processor_name

INPUT_GROUP = 32
"""Inputs that share a scale if they are rounded to 8 bits."""

console = Console()


@dataclass(frozen=True)
class DenseForm:
    """What is stored in few bits, or rounded.

    Attributes:
        head: bits of the output head, and of an embedding that shares its weight; None for float32.
        layers: bits of all linear layers in the blocks; None for float32.
        inputs: bits of the inputs of all linear layers; None for float32.
    """

    head: int | None = None
    layers: int | None = None
    inputs: int | None = None

    def __str__(self) -> str:
        parts = [f"{what} {bits} bits" for what, bits in asdict(self).items() if bits is not None]
        return ", ".join(parts) or "float32"


FORMS = (
    DenseForm(),
    DenseForm(head=8),
    DenseForm(head=4),
    DenseForm(head=8, layers=8),
    DenseForm(head=4, layers=4),
    DenseForm(inputs=8),
    DenseForm(head=8, layers=8, inputs=8),
)


def main(
    evaluation: Annotated[str, typer.Option(help="A raw WikiText file.")],
    model: Annotated[str, typer.Option(help="The model.")] = "smollm2",
    name: Annotated[str, typer.Option(help="The model's name on the page.")] = "SmolLM2-135M",
    windows: Annotated[int, typer.Option(help="Number of evaluation windows of 512 tokens.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder of quantization.json and quantization.md.")] = Path("docs"),
) -> None:
    """Measure what is missing, and write the page."""
    from .quantization import page

    path = out / "quantization.json"
    found = json.loads(path.read_text()) if path.exists() else {"processor": processor_name(), "outcomes": []}
    outcomes = found.setdefault("dense", [])
    done = [
        DenseForm(**outcome["form"])
        for outcome in outcomes
        if (outcome["model"], outcome["windows"]) == (name, windows)
    ]
    todo = [form for form in FORMS if form not in done]
    if todo:
        bench = Workbench(Protocol(model, evaluation, evaluation, wikitext=True, windows=windows, dtype=torch.float32))
        for form in todo:
            with rounded(bench.model, form):
                value = bench.perplexity()
            outcomes.append({"model": name, "windows": windows, "form": asdict(form), "perplexity": value})
            console.print(f"{name}: {form}: {value:.3f}", highlight=False)
            write_json(path, found)
    (out / "quantization.md").write_text(page(found))


@contextmanager
@torch.no_grad()
def rounded(model: Any, form: DenseForm) -> Iterator[None]:
    """A context in which the weights of a model have the values that few bits hold, and its inputs are rounded."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    tables = tables_of(model, form.head, None)
    head = next((found[0] for found in (tables.head, tables.embedding) if found is not None), None)
    for name, module in model.named_modules():
        is_head = module is model.get_output_embeddings()
        bits = form.head if name == head else form.layers if isinstance(module, nn.Linear) and not is_head else None
        if bits is not None:
            kept.append((module.weight, module.weight.clone()))
            module.weight.copy_(dequantize_dense(quantize_dense(module.weight, bits, GROUP)))
    try:
        with rounded_inputs(model, nn.Linear, form.inputs):
            yield
    finally:
        for weight, before in kept:
            weight.copy_(before)


@contextmanager
def rounded_inputs(model: Any, kind: type[nn.Module], bits: int | None) -> Iterator[None]:
    """A context in which the inputs of all layers of a kind are rounded to ``bits``; None rounds nothing."""
    layers = [] if bits is None else [module for module in model.modules() if isinstance(module, kind)]
    hooks = [layer.register_forward_pre_hook(_round_inputs(bits)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _round_inputs(bits: int) -> Any:
    def before(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        tokens = arguments[0].flatten(0, -2)
        absmax = largest_of_groups(tokens, INPUT_GROUP)
        steps = quantized_groups(tokens, absmax, INPUT_GROUP, bits)
        return (dequantized_groups(steps, absmax, INPUT_GROUP, bits).view_as(arguments[0]),)

    return before


def section(found: dict[str, Any]) -> list[str]:
    """The lines of docs/quantization.md about weights that are not pruned; none without results."""
    outcomes = found.get("dense", [])
    if not outcomes:
        return []
    lines = [
        "## Weights that are not pruned",
        "",
        "The dense models with their weights rounded to the nearest value of 8 or 4 bits, as `ace-triton pack "
        "--head-bits --dense-bits` stores them, by `make dense-bits`. The head of these models shares the embedding's "
        'weight, so its bits are those of both. "Inputs" are those of all linear layers, with a scale for every '
        f"{INPUT_GROUP}, as llama.cpp and `--input-bits 8` round them.",
        "",
    ]
    models = dict.fromkeys((outcome["model"], outcome["windows"]) for outcome in outcomes)
    headings = [f"{name}, {windows} windows" for name, windows in models]
    lines += [f"| | {' | '.join(headings)} |", "|---|" + "---:|" * len(headings)]
    values = {
        (outcome["model"], outcome["windows"], DenseForm(**outcome["form"])): outcome["perplexity"]
        for outcome in outcomes
    }
    for form in FORMS:
        cells = []
        for model in models:
            value, base = values.get((*model, form)), values.get((*model, DenseForm()))
            change = f" ({value / base - 1:+.2%})" if value and base and form != DenseForm() else ""
            cells.append("" if value is None else f"{value:.3f}{change}")
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return [*lines, ""]


if __name__ == "__main__":
    typer.run(main)
