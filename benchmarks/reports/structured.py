"""Perplexity, time and speed of smaller dense models by every structured method; writes docs/structured.{json,md}.

    python -m benchmarks.reports.structured --model smollm2 --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz

Results in docs/structured.json are reused, so a stopped run continues. Repeat with another --model and --name to add a
model, with another --seed to add a calibration sample. The option ``--list`` prints the names of all rows, with the CPU
seconds of the measured ones; ``--only`` measures some:

    --only "10% SAAP*, none"            fusion, stability and gradients beside SAAP at 10 %
    --only "* recovery, lstsq" --only "* group fine-tuning, lstsq"

A row without gradients takes a few forwards of the calibration text, with gradients about twice as long, and a row with
recovery as long as its optimizer steps. Rows of one call share the structures and the statistics, so the first one
takes longer, but the seconds of each row hold what it shares. A row that is asked for by name is measured at any ratio;
without ``--only`` ablations run at one ratio.
"""

from __future__ import annotations

import gc
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
from ace_triton.inputs.calibration import load_calibration, read_calibration
from ace_triton.inputs.text import read_documents, wikitext_rows
from ace_triton.process_memory import give_back_free_memory
from ace_triton.recovery.settings import GroupTuning, RecoverySettings
from ace_triton.recovery.train import recover
from ace_triton.structures.ranking import Earlier
from ace_triton.structures.run import Run
from ace_triton.structures.settings import ShrinkSettings

from .machines import processor
from .named_rows import CalibrationText, EvaluationText, ListRows, Only, chosen_rows, print_rows
from .record import read_record
from .structured_page import LENGTH, RATIOS, SAMPLES, WINDOW_LENGTH, Speed, page

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 16, 7

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
        ("SAAP, uneven widths", {"widths": "uneven"}),
        ("SAAP of gradients", {"importance": "taylor"}),
        ("SAAP of gradients, stability on", {"importance": "taylor", "stability": True}),
        ("SAAP of gradients, vectors alone", {"importance": "taylor", "fusion": "vector"}),
        ("SAAP of gradients, elements alone", {"importance": "taylor", "fusion": "element"}),
        ("LLM-Pruner, vectors", {"method": "llm-pruner", "terms": "vector"}),
        ("LLM-Pruner, mixed", {"method": "llm-pruner", "terms": "mixed"}),
    )
)
"""Measured at the first ratio alone, unless they are asked for."""


@dataclass(frozen=True)
class Training:
    """How a smaller model is trained toward the dense one.

    Attributes:
        steps: number of optimizer steps.
        sequences: number of sequences of the text.
        groups: settings of group fine-tuning; None for recovery.
        apart: no token of the text is in two sequences, as ``ace-triton recover`` cuts them.
    """

    steps: int
    sequences: int
    groups: GroupTuning | None = None
    apart: bool = False


TRAINED: dict[str, Training] = {
    "SAAP, then recovery": Training(60, 128),
    "SAAP, then group fine-tuning": Training(60, 128, GroupTuning()),
    "SAAP, then recovery for five minutes": Training(240, 480, apart=True),
}
"""SAAP with its update, trained toward the dense model. Measured as ablations are.

A fixed number of steps stands for five minutes on two cores, so that a busy machine gives the same model. A step reads
256 tokens, and the learning rate is that of ``ace-triton recover``.
"""

KEY = ("model", "ratio", "method", "update", "seed")
"""The entries of a result that tell it apart from others."""

console = Console()


@dataclass(frozen=True)
class Result:
    """A smaller model.

    Attributes:
        model: name of the dense model.
        method: name in the table.
        update: "lstsq", "bias" or "none".
        ratio: share of the blocks' parameters to remove.
        seed: random seed of the calibration sample.
        steps: number of optimizer steps of the training after it; 0 without one.
        removed: share that was removed.
        widths: number of structures before and after, by kind.
        seconds: CPU seconds of the run, training included.
        perplexity: on the evaluation text.
        speed: None if a model of the same widths has it.
    """

    model: str
    method: str
    update: str
    ratio: float
    seed: int
    steps: int
    removed: float
    widths: dict[str, list[int]]
    seconds: float
    perplexity: float
    speed: Speed | None


def main(
    calibration: CalibrationText = "",
    evaluation: EvaluationText = "",
    model: Annotated[str, typer.Option(help="Model to shrink.")] = "smollm2",
    name: Annotated[str, typer.Option(help="The model's name on the page.")] = "SmolLM2-135M",
    windows: Annotated[int, typer.Option(min=1, help="Number of evaluation windows of 512 tokens.")] = 20,
    seed: Annotated[int, typer.Option(help="Random seed of the calibration sample.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Number of torch's threads.")] = 1,
    only: Only = None,
    list_rows: ListRows = False,
    most: Annotated[int | None, typer.Option(help="Number of results to measure now; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of structured.json and structured.md.")] = Path("docs"),
) -> None:
    """Measure what is missing, and write the page."""
    torch.set_num_threads(threads)
    record = read(out)
    done = {tuple(result[part] for part in KEY) for result in record["results"]}
    if list_rows:
        seconds = {tuple(r[part] for part in KEY): f"{r['seconds']:.0f} CPU seconds" for r in record["results"]}
        print_rows(console, name, ((label(cell), seconds.get((name, *key(*cell), seed))) for cell in cells(every=True)))
        return
    wanted = chosen_rows(cells(every=bool(only)), label, only)
    todo = [cell for cell in wanted if (name, *key(*cell), seed) not in done]
    known = record["dense"].get(name)
    if todo and known is not None and known["windows"] != windows:
        raise typer.BadParameter(f"results of {name} have {known['windows']} windows, not {windows}: give --windows")
    bench = Bench(model, calibration, evaluation, windows, seed) if todo[:most] else None
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
        more = (*ABLATIONS, *((method, {}) for method in TRAINED)) if every or ratio == RATIOS[0] else ()
        for method, options in (*PUBLISHED, *FITTED, *more):
            yield ratio, method, options


def label(cell: Cell) -> str:
    """The name of a row, such as "20% SAAP, lstsq"."""
    ratio, method, update = key(*cell)
    return f"{ratio:.0%} {method}, {update}"


def key(ratio: float, method: str, options: dict[str, Any]) -> tuple[float, str, str]:
    """What tells the results of one model and seed apart: the other entries of :data:`KEY`."""
    return ratio, method, ShrinkSettings(ratio, **options).chosen_update


def read(out: Path) -> dict[str, Any]:
    """Earlier results."""
    return read_record(out / "structured.json", dense={}, results=[])


class Bench:
    """A dense model, its texts, and what earlier runs on them have found."""

    def __init__(self, source: str, calibration: str, evaluation: str, windows: int, seed: int) -> None:
        self.model, self._tokenizer = checkpoint.load(source, dtype=torch.float32, own_memory=True)
        tokenizer, self._documents, self._seed = self._tokenizer, read_calibration(calibration), seed
        self._sequences = load_calibration(self._documents, tokenizer, samples=SAMPLES, length=LENGTH, seed=seed)
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
        seconds, training = sum(report.seconds.values()), TRAINED.get(method)
        if training is not None:
            seconds += self._train(smaller, training)
        value = self.perplexity(smaller)
        del smaller
        gc.collect()  # Modules are in reference cycles, and a model is a few large tensors.
        give_back_free_memory()
        steps, update = training.steps if training else 0, settings.chosen_update
        return Result(name, method, update, ratio, self._seed, steps, report.removed, widths, seconds, value, speed)

    def _train(self, smaller: Any, training: Training) -> float:
        """Train the smaller model on text that other seeds cut; CPU seconds."""
        text = load_calibration(
            self._documents,
            self._tokenizer,
            samples=training.sequences,
            length=LENGTH,
            seed=self._seed + 1,
            apart=training.apart,
        )
        how = RecoverySettings(
            steps=training.steps, groups=training.groups, seed=self._seed, forward_dtype=torch.float32
        )
        return recover(smaller, self.model, text.ids, how).cpu_seconds

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


if __name__ == "__main__":
    typer.run(main)
