"""Perplexity, time and speed of smaller dense models by every structured method; writes docs/structured.{json,md}.

    python -m benchmarks.reports.structured --model smollm2 --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz

Results in docs/structured.json are reused, so a stopped run continues. Repeat with another --model to add it. The
option ``--list`` prints the names of all rows, with the CPU seconds of the measured ones; ``--only`` measures some:

    --only "10% SAAP*, none"            fusion, stability and gradients beside SAAP at 10 %
    --only "* recovery, lstsq" --only "* group fine-tuning, lstsq"

A row without gradients takes a few forwards of the calibration text, with gradients about twice as long, and a row with
recovery as long as its optimizer steps. Rows of one call share the structures and the statistics, so the first one
takes longer. A row that is asked for by name is measured at any ratio; without ``--only`` ablations run at one ratio.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton.commands.report import write_json
from ace_triton.evaluate import perplexity
from ace_triton.inputs import checkpoint
from ace_triton.inputs.beginnings import Beginning, text_ids
from ace_triton.inputs.calibration import load_calibration
from ace_triton.inputs.text import read_documents, wikitext_rows
from ace_triton.process_memory import give_back_free_memory
from ace_triton.provenance import name_of
from ace_triton.recovery.settings import GroupTuning, RecoverySettings
from ace_triton.recovery.train import recover
from ace_triton.structures.ranking import Earlier
from ace_triton.structures.run import Run
from ace_triton.structures.settings import ShrinkSettings

from .cpu_ratios import processor
from .named_rows import ListRows, Only, chosen_rows, print_rows
from .record import read_record

RATIOS = (0.2, 0.1, 0.3)
SAMPLES, LENGTH, WINDOW_LENGTH = 64, 128, 512
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 16, 3

PUBLISHED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("FLAP", {"method": "flap"}),
    ("SAAP", {}),
    ("SAAP", {"update": "none"}),
    ("Wanda-sp", {"method": "wanda-sp"}),
    ("depth (ShortGPT)", {"method": "depth"}),
    ("magnitude", {"method": "magnitude"}),
    ("LLM-Pruner, elements", {"method": "llm-pruner"}),
)
FITTED: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    (name, {**options, "update": "lstsq"}) for name, options in PUBLISHED if options.get("method", "depth") != "depth"
)
ABLATIONS: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    (name, {**options, "update": "none"})
    for name, options in (
        ("SAAP, vectors alone", {"fusion": "vector"}),
        ("SAAP, elements alone", {"fusion": "element"}),
        ("SAAP, one scale an importance", {"fusion": "mean"}),
        ("SAAP, learned scales", {"fusion": "learned"}),
        ("SAAP, stability on", {"stability": True}),
        ("SAAP of gradients", {"importance": "taylor"}),
        ("SAAP of gradients, stability on", {"importance": "taylor", "stability": True}),
        ("SAAP of gradients, vectors alone", {"importance": "taylor", "fusion": "vector"}),
        ("SAAP of gradients, elements alone", {"importance": "taylor", "fusion": "element"}),
        ("LLM-Pruner, vectors", {"method": "llm-pruner", "terms": "vector"}),
        ("LLM-Pruner, mixed", {"method": "llm-pruner", "terms": "mixed"}),
    )
)
"""Measured at the first ratio alone, unless they are asked for."""

STEPS, TRAINED = 60, 128
"""Optimizer steps of a recovery, and sequences of its text."""

RECOVERED: tuple[tuple[str, GroupTuning | None], ...] = (
    ("SAAP, then recovery", None),
    ("SAAP, then group fine-tuning", GroupTuning()),
)
"""SAAP with its update, trained toward the dense model in the same number of steps. Measured as ablations are."""

_ALONE = ("SAAP, vectors alone", "SAAP, elements alone")
PARTS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("fusion, one scale a structure", "SAAP", _ALONE, "none"),
    ("fusion, one scale an importance", "SAAP, one scale an importance", _ALONE, "none"),
    ("fusion, learned scales", "SAAP, learned scales", _ALONE, "none"),
    (
        "fusion, of gradients",
        "SAAP of gradients",
        ("SAAP of gradients, vectors alone", "SAAP of gradients, elements alone"),
        "none",
    ),
    ("stability", "SAAP, stability on", ("SAAP",), "none"),
    ("stability, of gradients", "SAAP of gradients, stability on", ("SAAP of gradients",), "none"),
    ("group fine-tuning", "SAAP, then group fine-tuning", ("SAAP, then recovery",), "lstsq"),
)
"""A part of SAAP, the method with it, the methods without it, and the update of all."""

KEY = ("model", "ratio", "method", "update")
"""The entries of a result that tell it apart from others."""

console = Console()


@dataclass(frozen=True)
class Speed:
    """Rates of a smaller model beside the dense one, in transformers, in tokens per CPU second on one thread.

    Attributes:
        prompt, dense_prompt: tokens of a prompt.
        decode, dense_decode: generated tokens, prompt left out.
        promised: weights that the dense model multiplies for a token, over those of the smaller one.
    """

    prompt: float
    dense_prompt: float
    decode: float
    dense_decode: float
    promised: float


@dataclass(frozen=True)
class Result:
    """A smaller model.

    Attributes:
        model: name of the dense model.
        method: name in the table.
        update: "lstsq", "bias" or "none".
        ratio: share of the blocks' parameters to remove.
        removed: share that was removed.
        widths: number of structures before and after, by kind.
        seconds: CPU seconds of the run.
        perplexity: on the evaluation text.
        speed: None if a model of the same widths has it.
    """

    model: str
    method: str
    update: str
    ratio: float
    removed: float
    widths: dict[str, list[int]]
    seconds: float
    perplexity: float
    speed: Speed | None


def main(
    calibration: Annotated[str, typer.Option()],
    evaluation: Annotated[str, typer.Option(help="A raw WikiText file.")],
    model: Annotated[str, typer.Option()] = "smollm2",
    windows: Annotated[int, typer.Option(min=1)] = 20,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    only: Only = None,
    list_rows: ListRows = False,
    most: Annotated[int | None, typer.Option(help="Number of results to measure now; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of structured.json and structured.md.")] = Path("docs"),
) -> None:
    """Measure what is missing, and write the page."""
    torch.set_num_threads(threads)
    record = read(out)
    name = "SmolLM2-135M" if model == "smollm2" else name_of(model)
    done = {tuple(result[part] for part in KEY) for result in record["results"]}
    if list_rows:
        seconds = {tuple(r[part] for part in KEY): f"{r['seconds']:.0f} CPU seconds" for r in record["results"]}
        print_rows(console, ((label(cell), seconds.get((name, *key(*cell)))) for cell in cells(every=True)))
        return
    wanted = chosen_rows(cells(every=bool(only)), label, only)
    todo = [cell for cell in wanted if (name, *key(*cell)) not in done]
    bench = Bench(model, calibration, evaluation, windows) if todo[:most] else None
    for ratio, method, options in todo[:most]:
        assert bench is not None
        dense = record["dense"].setdefault(name, {})
        if "perplexity" not in dense:
            dense.update(perplexity=bench.perplexity(bench.model), windows=windows, processor=processor())
        widths = {tuple(map(str, r["widths"].items())) for r in record["results"] if r["model"] == name and r["speed"]}
        result = bench.result(name, ratio, method, options, widths)
        record["results"].append(asdict(result))
        console.print(result, highlight=False)
        write_json(out / "structured.json", record)
        (out / "structured.md").write_text(page(record))
    (out / "structured.md").write_text(page(record))


Cell = tuple[float, str, dict[str, Any]]


def cells(*, every: bool = False) -> Iterator[Cell]:
    """What is measured, the most important first: ratio, name in the table, and settings.

    Args:
        every: ablations and recoveries at all ratios, not at the first one alone.
    """
    for ratio in RATIOS:
        more = (*ABLATIONS, *((method, {}) for method, _ in RECOVERED)) if every or ratio == RATIOS[0] else ()
        for method, options in (*PUBLISHED, *FITTED, *more):
            yield ratio, method, options


def label(cell: Cell) -> str:
    """The name of a row, such as "20% SAAP, lstsq"."""
    ratio, method, update = key(*cell)
    return f"{ratio:.0%} {method}, {update}"


def key(ratio: float, method: str, options: dict[str, Any]) -> tuple[float, str, str]:
    """What tells the results of one model apart: all of :data:`KEY` but the model."""
    return ratio, method, ShrinkSettings(ratio, **options).chosen_update


def read(out: Path) -> dict[str, Any]:
    """Earlier results."""
    return read_record(out / "structured.json", dense={}, results=[])


class Bench:
    """A dense model, its texts, and what earlier runs on them have found."""

    def __init__(self, source: str, calibration: str, evaluation: str, windows: int) -> None:
        self.model, tokenizer = checkpoint.load(source, dtype=torch.float32, own_memory=True)
        self._sequences = load_calibration(calibration, tokenizer, samples=SAMPLES, length=LENGTH)
        self._trained = load_calibration(calibration, tokenizer, samples=TRAINED, length=LENGTH, seed=1).ids
        rows = wikitext_rows("".join(read_documents(evaluation)))
        self._ids = text_ids("\n\n".join(rows), tokenizer, Beginning.of(tokenizer, "auto"))
        self._windows, self._earlier = windows, Earlier()

    def perplexity(self, model: Any) -> float:
        return perplexity(model, self._ids, length=WINDOW_LENGTH, windows=self._windows).perplexity

    def result(self, name: str, ratio: float, method: str, options: dict[str, Any], timed: set[Any]) -> Result:
        """Make the smaller model and measure it; its speed only if its widths are not among ``timed``."""
        settings = ShrinkSettings(ratio, **options)
        run = Run(self.model, self._sequences, settings, earlier=self._earlier, clock=time.process_time)
        smaller, report = run.result(dry_run=False)
        assert smaller is not None
        widths = {kind: list(counts) for kind, counts in report.widths.items()}
        speed = None if tuple(map(str, widths.items())) in timed else self._speed(smaller)
        seconds = sum(report.seconds.values()) + self._recover(smaller, method)
        value = self.perplexity(smaller)
        del smaller
        gc.collect()  # Modules are in reference cycles, and a model is a few large tensors.
        give_back_free_memory()
        return Result(name, method, settings.chosen_update, ratio, report.removed, widths, seconds, value, speed)

    def _recover(self, smaller: Any, method: str) -> float:
        """Train the smaller model, if the row asks for it; CPU seconds."""
        tuning = dict(RECOVERED)
        if method not in tuning:
            return 0.0
        how = RecoverySettings(steps=STEPS, groups=tuning[method], forward_dtype=torch.float32)
        return recover(smaller, self.model, self._trained, how).cpu_seconds

    def _speed(self, smaller: Any) -> Speed:
        sides = (smaller, self.model)
        rates: dict[str, list[list[float]]] = {"prompt": [[], []], "decode": [[], []]}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for _ in range(ROUNDS):
                for place, model in enumerate(sides):
                    prompt, decode = _rates(model, self._ids[None, :PROMPT_TOKENS])
                    rates["prompt"][place].append(prompt)
                    rates["decode"][place].append(decode)
        finally:
            torch.set_num_threads(threads)
        (prompt, dense_prompt), (decode, dense_decode) = (map(median, rates[kind]) for kind in ("prompt", "decode"))
        promised = _multiplied(self.model) / _multiplied(smaller)
        return Speed(prompt, dense_prompt, decode, dense_decode, promised)


@torch.no_grad()
def _rates(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
    """Tokens of the prompt, and generated tokens, per CPU second."""
    started = time.process_time()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    read = time.process_time()
    token = output.logits[:, -1:].argmax(-1)
    for _ in range(NEW_TOKENS):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return prompt.shape[1] / (read - started), NEW_TOKENS / (time.process_time() - read)


def _multiplied(model: Any) -> int:
    """Number of weights that one generated token is multiplied with: all matrices but the embedding, and the head."""
    embedding = model.get_input_embeddings().weight
    matrices = sum(p.numel() for p in set(model.parameters()) if p.dim() == 2 and p is not embedding)
    return matrices + (embedding.numel() if model.get_output_embeddings().weight is embedding else 0)


def page(record: dict[str, Any]) -> str:
    """docs/structured.md."""
    processors = sorted({dense["processor"] for dense in record["dense"].values()})
    lines = [
        "# Structured pruning: smaller dense models",
        "",
        f"Measured by `make structured` on a CPU ({', '.join(processors)}), in fp32 on one thread: {SAMPLES} x "
        f"{LENGTH} tokens of C4, seed 0, windows of {WINDOW_LENGTH} tokens of WikiText-2. At least the ratio of the "
        "blocks' parameters is removed. Feed-forward widths stay multiples of 64, so a little more may go, as the "
        "table says. All methods keep every block equally wide. The number of key-value groups to remove is the one "
        "with the lowest loss on the calibration text. Seconds are CPU seconds of the whole run, without loading; "
        f"recovery and group fine-tuning have {STEPS} optimizer steps in them. "
        "Rates are tokens per CPU second in transformers on one thread. *Promised* is the number of weights that a "
        "token is multiplied with in the dense model, over that in the smaller one.",
    ]
    for name, dense in record["dense"].items():
        results = [result for result in record["results"] if result["model"] == name]
        lines += ["", f"## {name}", "", f"Dense perplexity: {dense['perplexity']:.2f}, {dense['windows']} windows.", ""]
        lines += _methods(results, dense["perplexity"])
        lines += _parts(results)
        lines += ["", "### Speed", "", *_speeds(results)]
    return "\n".join(lines) + "\n"


def _methods(results: list[dict[str, Any]], dense: float) -> list[str]:
    lines = [
        "| method | update | ratio | removed | widths | CPU seconds | perplexity | over dense |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for result in sorted(results, key=lambda result: (result["ratio"], result["perplexity"])):
        lines.append(
            f"| {result['method']} | {result['update']} | {result['ratio']:.0%} | {result['removed']:.1%} | "
            f"{_shown(result['widths'])} | {result['seconds']:.0f} | {result['perplexity']:.2f} | "
            f"{result['perplexity'] / dense:.2f}x |"
        )
    return lines


def _parts(results: list[dict[str, Any]]) -> list[str]:
    """What each part of SAAP brings; nothing before one of them is measured."""
    values = {(result["ratio"], result["method"], result["update"]): result["perplexity"] for result in results}
    rows = []
    for (part, method, others, update), ratio in itertools.product(PARTS, RATIOS):
        own, rivals = values.get((ratio, method, update)), [values.get((ratio, other, update)) for other in others]
        if own is None or None in rivals:
            continue
        best = min(rival for rival in rivals if rival is not None)
        rows.append(f"| {part} | {ratio:.0%} | {own:.2f} | {best:.2f} | {own / best - 1:+.1%} |")
    if not rows:
        return []
    return [
        "",
        "### What the parts of SAAP bring",
        "",
        "Perplexity with a part and without it. Without fusion is the better one of both importances. Without group "
        "fine-tuning is a recovery of the same number of steps. A change below zero is a gain; one seed.",
        "",
        "| part | ratio | with it | without it | change |",
        "|---|---:|---:|---:|---:|",
        *rows,
    ]


def _speeds(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| widths | removed | prompt, tokens/s | dense | gain | generated, tokens/s | dense | gain | promised |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in sorted((r for r in results if r["speed"]), key=lambda result: result["removed"]):
        speed = Speed(**result["speed"])
        lines.append(
            f"| {_shown(result['widths'])} | {result['removed']:.1%} | {speed.prompt:.0f} | {speed.dense_prompt:.0f} | "
            f"{speed.prompt / speed.dense_prompt:.2f}x | {speed.decode:.1f} | {speed.dense_decode:.1f} | "
            f"{speed.decode / speed.dense_decode:.2f}x | {speed.promised:.2f}x |"
        )
    return lines


_KINDS = {
    "channels": "width",
    "groups": "groups",
    "experts": "experts",
    "expert_channels": "expert width",
    "blocks": "blocks",
}


def _shown(widths: dict[str, list[int]]) -> str:
    changed = [f"{_KINDS[kind]} {old} to {new}" for kind, (old, new) in widths.items() if old != new]
    return ", ".join(changed)


if __name__ == "__main__":
    typer.run(main)
