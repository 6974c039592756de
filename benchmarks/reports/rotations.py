"""Whether rotating the channels of values helps pruning; writes docs/rotations.{json,md}.

    python -m benchmarks.reports.rotations --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz --model smollm2

The values of a key-value group can be multiplied by any orthogonal R: the rows of v by R^T, the columns of o that read
them by R. The dense model computes the same. The importance of a weight is w_ij^2 G_jj, with each input's Gram matrix G
as in the dense model. R is learned by Adam to lower the importance of the weights that 2:4 prunes, as a sum over o and
v of their shares without rotation. DenoiseRotator lowers the entropy of importance instead, and also rotates the
residual stream. Results in docs/rotations.json are reused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from ace_triton.commands.report import write_json
from ace_triton.recipe import Recipe
from ace_triton.study.cells import Cell
from ace_triton.study.workbench import Protocol, Workbench

SAMPLES, LENGTH, SEED = 64, 128, 0
GRAM_SEQUENCES = 32
STEPS, RATE = 60, 0.01
LEAST_GAIN = 0.02
"""A rotation would be worth an option of ``prune`` from this relative fall of perplexity on."""

RECIPES = (
    Recipe("wanda", permute=True, update="lstsq"),
    Recipe("wanda", update="lstsq"),
)

console = Console()


@dataclass(frozen=True)
class Outcome:
    """A pruned model.

    Attributes:
        model: name on the page.
        recipe: the recipe's words.
        rotated: whether values were rotated first.
        perplexity: on the evaluation text.
        windows: number of evaluation windows.
    """

    model: str
    recipe: str
    rotated: bool
    perplexity: float
    windows: int


def main(
    calibration: Annotated[str, typer.Option()],
    evaluation: Annotated[str, typer.Option(help="A raw WikiText file.")],
    model: Annotated[str, typer.Option()] = "smollm2",
    name: Annotated[str, typer.Option(help="The model's name on the page.")] = "SmolLM2-135M",
    windows: Annotated[int, typer.Option(min=1)] = 10,
    most: Annotated[int | None, typer.Option(help="Number of results to measure now; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of rotations.json and rotations.md.")] = Path("docs"),
) -> None:
    """Measure what is missing, and write the page."""
    record = read(out)
    done = {(r["model"], r["recipe"], r["rotated"], r["windows"]) for r in record["outcomes"]}
    wanted = [(recipe, rotated) for recipe in RECIPES for rotated in (False, True)]
    todo = [cell for cell in wanted if (name, cell[0].words, cell[1], windows) not in done][:most]
    protocol = Protocol(
        model, calibration, evaluation, wikitext=True, samples=SAMPLES, windows=windows, dtype=torch.float32
    )
    for rotated in (False, True):
        recipes = [recipe for recipe, wanted_rotated in todo if wanted_rotated == rotated]
        if recipes:
            with _bench(protocol, rotated=rotated) as bench:
                record["dense"].setdefault(name, {})["rotated" if rotated else "given"] = bench.perplexity()
                for recipe in recipes:
                    with bench.pruned(Cell(recipe, LENGTH, SEED)):
                        found = Outcome(name, recipe.words, rotated, bench.perplexity(), windows)
                    record["outcomes"].append(asdict(found))
                    console.print(found, highlight=False)
                    write_json(out / "rotations.json", record)
    (out / "rotations.md").write_text(page(record))


@contextmanager
def _bench(protocol: Protocol, *, rotated: bool) -> Iterator[Workbench]:
    """The model as it is given, or rotated, from a temporary folder."""
    if not rotated:
        yield Workbench(protocol)
        return
    with TemporaryDirectory() as folder:
        given = Workbench(protocol)
        rotate(given.model, given.calibration(LENGTH, SEED)[:GRAM_SEQUENCES])
        given.model.save_pretrained(folder)
        given.tokenizer.save_pretrained(folder)
        del given
        yield Workbench(replace(protocol, model=folder))


def rotate(model: Any, ids: torch.Tensor) -> None:
    """Rotate the values of every key-value group of a Llama-like model in place.

    Args:
        model: with ``model.layers[i].self_attn.v_proj`` and ``o_proj``.
        ids: calibration sequences, int64 [n_sequences, length].
    """
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    layers = [layer.self_attn for layer in model.model.layers]
    grams: dict[nn.Module, torch.Tensor] = {}
    squares: dict[nn.Module, torch.Tensor] = {}

    def of_outputs(module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens = args[0].flatten(0, -2).unflatten(-1, (heads, -1)).transpose(0, 1)
        grams[module] = grams.get(module, 0) + tokens.transpose(1, 2) @ tokens

    def of_values(module: nn.Module, args: tuple[Any, ...]) -> None:
        squares[module] = squares.get(module, 0) + args[0].flatten(0, -2).square().sum(0)

    hooks = [layer.o_proj.register_forward_pre_hook(of_outputs) for layer in layers]
    hooks += [layer.v_proj.register_forward_pre_hook(of_values) for layer in layers]
    with torch.no_grad():
        for part in ids.split(8):
            model.model(part, use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        into, of = layer.o_proj.weight.data, layer.v_proj.weight.data
        outputs, values = into.unflatten(1, (groups, heads // groups, -1)), of.unflatten(0, (groups, -1))
        gram = grams[layer.o_proj].unflatten(0, (groups, -1))
        rotation = learned(outputs, values, gram, squares[layer.v_proj])
        into.copy_(torch.einsum("ogsd,gde->ogse", outputs, rotation).flatten(1))
        of.copy_(torch.einsum("gde,gdi->gei", rotation, values).flatten(0, 1))
        if layer.v_proj.bias is not None:
            bias = layer.v_proj.bias.data
            bias.copy_(torch.einsum("gde,gd->ge", rotation, bias.unflatten(0, (groups, -1))).flatten())


def learned(outputs: torch.Tensor, values: torch.Tensor, gram: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """The rotation of each key-value group, fp32 [groups, width, width].

    Args:
        outputs: o's weight, [out_features, groups, heads per group, width].
        values: v's weight, [groups, width, in_features].
        gram: of o's inputs, [groups, heads per group, width, width].
        squares: sum of squares of v's inputs, [in_features].
    """
    groups, width = values.shape[:2]
    start = torch.zeros(groups, width, width, dtype=torch.float32, device="cpu", requires_grad=True)
    optimizer = torch.optim.Adam([start], lr=RATE)

    def importance(rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        energy = torch.einsum("gde,gsdf,gfe->gse", rotation, gram, rotation)
        of_outputs = torch.einsum("ogsd,gde->ogse", outputs, rotation).square() * energy
        return pruned(of_outputs), pruned(torch.einsum("gde,gdi->gei", rotation, values).square() * squares)

    with torch.no_grad():
        before = importance(torch.matrix_exp(start))
    best, least = torch.matrix_exp(start.detach()), 2.0
    for _ in range(STEPS + 1):
        with torch.enable_grad():
            rotation = torch.matrix_exp(start - start.transpose(1, 2))
            shares = [part / whole for part, whole in zip(importance(rotation), before, strict=True)]
            total = torch.stack(shares).sum()
            optimizer.zero_grad()
            total.backward()
        if float(total.detach()) < least:
            best, least = rotation.detach(), float(total.detach())
        optimizer.step()
    return best


def pruned(importance: torch.Tensor) -> torch.Tensor:
    """The sum of the two smallest of every four neighbors."""
    first, second, third, fourth = importance.unflatten(-1, (-1, 4)).unbind(-1)
    a, b = torch.maximum(first, second), torch.minimum(first, second)
    c, d = torch.maximum(third, fourth), torch.minimum(third, fourth)
    return importance.sum() - torch.maximum(torch.maximum(a + b, a + c), c + d).sum()


def read(out: Path) -> dict[str, Any]:
    """Earlier results."""
    path = out / "rotations.json"
    empty: dict[str, Any] = {"dense": {}, "outcomes": []}
    return json.loads(path.read_text()) if path.exists() else empty


def page(record: dict[str, Any]) -> str:
    """docs/rotations.md."""
    lines = [
        "# Rotated values",
        "",
        f"Measured on a CPU by `make rotations`, in float32: {SAMPLES} x {LENGTH} tokens of C4, seed {SEED}, windows "
        "of 512 tokens of WikiText-2, 2:4. The values of each key-value group are multiplied by an orthogonal matrix, "
        "and the output projection by its inverse, before the model is pruned. The dense model computes the same. "
        f"{STEPS} steps of Adam lower the importance of the weights that 2:4 prunes, from the Gram matrices of "
        f"{GRAM_SEQUENCES} sequences. A fall of perplexity by {LEAST_GAIN:.0%} or more would be worth an option of "
        "`ace-triton prune`.",
    ]
    changes: list[float] = []
    for name, dense in record["dense"].items():
        shown = ", ".join(f"{value:.2f} {which}" for which, value in dense.items())
        lines += ["", f"## {name}", "", f"Dense perplexity: {shown}.", ""]
        lines += ["| recipe | windows | given | rotated | change |", "|---|---:|---:|---:|---:|"]
        found: dict[tuple[str, int], dict[bool, float]] = {}
        for outcome in record["outcomes"]:
            if outcome["model"] == name:
                key = (outcome["recipe"], outcome["windows"])
                found.setdefault(key, {})[outcome["rotated"]] = outcome["perplexity"]
        for (recipe, windows), pair in found.items():
            given, rotated = pair.get(False), pair.get(True)
            cells = ["" if value is None else f"{value:.2f}" for value in (given, rotated)]
            both = given is not None and rotated is not None
            changes += [rotated / given - 1] if both else []
            lines.append(f"| {recipe} | {windows} | {' | '.join(cells)} | {f'{changes[-1]:+.1%}' if both else ''} |")
    if changes:
        reached = sum(change <= -LEAST_GAIN for change in changes)
        lines += ["", f"{reached} of {len(changes)} falls reach {LEAST_GAIN:.0%}.", "`prune` has no such option yet."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
