"""The score that channel orders retain at 2:4, and the time of their search; writes docs/permutation.{json,md}.

    python -m benchmarks.reports.permutation --calibration c4.jsonl.gz

Four searches on the down and output projections of SmolLM2-135M: none; RIA's heuristic; the heuristic with one sweep
of linear sum assignment over a plain-torch cost matrix and SciPy's solver, as in RIA's published code; and ours. Times
are CPU seconds of one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from scipy.optimize import linear_sum_assignment

from ace_triton import ActivationStats
from ace_triton.commands.report import write_json
from ace_triton.inputs import checkpoint
from ace_triton.inputs.calibration import load_calibration
from ace_triton.kernels.join_gains import join_gains_reference
from ace_triton.kernels.score_terms import scores_reference
from ace_triton.methods.registry import metric
from ace_triton.reordering.permutation import retained_score, search_permutation, snake_order

N, M = 2, 4
console = Console()


@dataclass(frozen=True)
class Row:
    """A search on all layers of one kind.

    Attributes:
        layers: kind of layer.
        search: name of the search.
        retained: retained score over that of the given order, minus 1; mean over the layers.
        seconds: mean CPU seconds per layer.
    """

    layers: str
    search: str
    retained: float
    seconds: float


def given_order(scores: torch.Tensor) -> torch.Tensor:
    """The slots [n_pools, M, groups] of the given order."""
    return torch.arange(scores.shape[2]).reshape(-1, M).t().expand(len(scores), -1, -1)


def sweep_of_assignments(scores: torch.Tensor) -> torch.Tensor:
    """RIA's search with --lsa: assigns each slot's channels to groups again, once."""
    slots = snake_order(scores, M)
    for taken in range(M):
        columns = torch.stack([scores.gather(2, s[:, None].expand(-1, scores.shape[1], -1)) for s in slots.unbind(1)])
        others = columns[[slot for slot in range(M) if slot != taken]].sort(0).values[M - 1 - N]
        gains = join_gains_reference(columns[taken], others)
        joins = torch.stack([torch.as_tensor(linear_sum_assignment(g.numpy(), maximize=True)[1]) for g in gains])
        slots[:, taken] = slots[:, taken].gather(1, joins)
    return slots


def ours(scores: torch.Tensor) -> torch.Tensor:
    """The slots of :func:`ace_triton.reordering.permutation.search_permutation`."""
    return search_permutation(scores, N, M).order.unflatten(1, (-1, M)).transpose(1, 2)


SEARCHES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": given_order,
    "heuristic (RIA)": lambda scores: snake_order(scores, M),
    "heuristic and assignment, SciPy (RIA)": sweep_of_assignments,
    "ours": ours,
}


def collect_scores(model: torch.nn.Module, ids: torch.Tensor, method: str) -> dict[str, list[torch.Tensor]]:
    """Scores, fp32 [n_pools, rows, channels], of every down and output projection, by kind."""
    scores: dict[str, list[torch.Tensor]] = {"down_proj": [], "o_proj": []}
    heads, width = model.config.num_key_value_heads, model.config.head_dim

    def note(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        terms = metric(method).terms(layer.weight.detach(), ActivationStats.from_tokens(args[0]))
        score = scores_reference(layer.weight, terms)
        kind = "down_proj" if score.shape[0] != score.shape[1] else "o_proj"
        pools = heads if kind == "o_proj" else 1
        split = score.unflatten(1, (pools, -1, width if kind == "o_proj" else score.shape[1]))
        scores[kind].append(split.permute(1, 0, 2, 3).flatten(1, 2).contiguous())

    layers = [m for name, m in model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return scores


def measure(kind: str, layers: list[torch.Tensor]) -> list[Row]:
    """Run every search on every layer."""
    retained: dict[str, list[float]] = {name: [] for name in SEARCHES}
    seconds: dict[str, list[float]] = {name: [] for name in SEARCHES}
    for scores in layers:
        base = float(retained_score(scores, given_order(scores), N).sum())
        for name, search in SEARCHES.items():
            start = time.process_time()
            slots = search(scores)
            seconds[name].append(time.process_time() - start)
            retained[name].append(float(retained_score(scores, slots, N).sum()) / base - 1)
    mean = statistics.mean
    return [Row(kind, name, mean(retained[name]), mean(seconds[name])) for name in SEARCHES]


def main(
    calibration: Annotated[str, typer.Option()] = "allenai/c4:en",
    method: Annotated[str, typer.Option()] = "ria",
    layers: Annotated[int | None, typer.Option(help="Number of layers of each kind; default: all.")] = None,
    out: Annotated[Path, typer.Option()] = Path("docs/permutation.json"),
) -> None:
    """Measure, and write OUT and the page beside it."""
    torch.set_num_threads(1)
    model, tokenizer = checkpoint.load("smollm2")
    ids = load_calibration(calibration, tokenizer, samples=16, length=128).ids
    rows = [
        row for kind, scores in collect_scores(model, ids, method).items() for row in measure(kind, scores[:layers])
    ]
    write_json(out, {"method": method, "pattern": f"{N}:{M}", "rows": [asdict(row) for row in rows]})
    text = page(method, rows)
    out.with_suffix(".md").write_text(text)
    console.print(text, highlight=False)


def page(method: str, rows: list[Row]) -> str:
    """docs/permutation.md."""
    lines = [
        "# Channel orders",
        "",
        f"Measured on one CPU thread by `make permutation`: SmolLM2-135M at {N}:{M} with the score of {method}, means "
        "over layers. Retained: the score of the kept weights, compared with the given order.",
        "",
        "| layers | search | retained | CPU seconds per layer |",
        "|---|---|---:|---:|",
        *(f"| {row.layers} | {row.search} | {row.retained:+.2%} | {row.seconds:.3f} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
