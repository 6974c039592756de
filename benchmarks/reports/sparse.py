"""A model pruned to 2:4, dense with zeros and packed: bytes, memory, tokens; writes docs/sparse.{json,md}.

    python -m benchmarks.reports.sparse

Each side is loaded from its own folder. Memory is measured in a new process for each. Tokens are greedy, in one
sequence, on one thread; both sides run in turn. Rates are of CPU time and include the prompt.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton import prune_model
from ace_triton.commands.report import write_json
from ace_triton.formats.registry import load_model
from ace_triton.inputs import checkpoint
from ace_triton.inputs.calibration import load_calibration
from ace_triton.packed.checkpoint import save_packed
from ace_triton.packed.pack_model import pack_model

from ..harness.resident import PROMPT, Resident, measure_resident
from .cpu_comparisons import DTYPES
from .machines import processor

PATTERN = "2:4"
SAMPLES, LENGTH = 16, 128
console = Console()


@dataclass(frozen=True)
class Side:
    """One form of the pruned model.

    Attributes:
        file_bytes: bytes of its tensors on disk.
        resident: memory of a process that loads it and generates.
        tokens_per_second: median over rounds.
    """

    file_bytes: int
    resident: Resident
    tokens_per_second: float


@dataclass(frozen=True)
class Pair:
    """Both forms in one dtype.

    Attributes:
        dtype: "fp32" or "bf16".
        dense, packed: the model with zeros, and the packed one.
        layer_bytes: bytes of the packed layers over their dense bytes.
        faster: tokens per second of the packed form over those of the dense one, median over rounds.
        same_tokens: number of generated tokens before the first difference.
    """

    dtype: str
    dense: Side
    packed: Side
    layer_bytes: float
    faster: float
    same_tokens: int


@dataclass(frozen=True)
class Generated:
    """Tokens and times of both sides.

    Attributes:
        tokens: int64 [new_tokens], for each side.
        seconds: CPU seconds by round, for each side.
    """

    tokens: tuple[torch.Tensor, torch.Tensor]
    seconds: tuple[list[float], list[float]]


def main(
    model: Annotated[str, typer.Option()] = "smollm2",
    calibration: Annotated[str, typer.Option()] = "pydoc:calibration",
    method: Annotated[str, typer.Option()] = "wanda",
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help="fp32 or bf16; default: both.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write, without the suffix.")] = Path("docs/sparse"),
) -> None:
    """Prune, save both forms and measure them; write OUT.json and OUT.md."""
    torch.set_num_threads(1)
    pruned, tokenizer = checkpoint.load(model)
    ids = load_calibration(calibration, tokenizer, samples=SAMPLES, length=LENGTH).ids
    prune_model(pruned, ids, method, PATTERN, sequential="none")
    with tempfile.TemporaryDirectory() as folder:
        pairs = [
            measure(label, pruned.to(DTYPES[label]), tokenizer, Path(folder) / label, new_tokens, rounds)
            for label in dtypes or DTYPES
        ]
    setting = {
        "model": "SmolLM2-135M" if model == "smollm2" else Path(model).name,
        "pattern": PATTERN,
        "method": method,
        "samples": SAMPLES,
        "length": LENGTH,
        "prompt": PROMPT,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "processor": processor(),
        "torch": torch.__version__,
    }
    content = {"setting": setting, "pairs": [asdict(pair) for pair in pairs]}
    write_json(out.with_suffix(".json"), content)
    lines = page(content)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    for line in lines:
        console.print(line, highlight=False)


def measure(label: str, model: Any, tokenizer: Any, folder: Path, new_tokens: int, rounds: int) -> Pair:
    """Save both forms of a pruned model under ``folder`` and measure them."""
    dense, packed = folder / "dense", folder / "packed"
    checkpoint.save(model, tokenizer, dense, {})
    sparse, _ = checkpoint.load(dense)
    report = pack_model(sparse)
    save_packed(sparse, tokenizer, packed)
    del sparse
    residents = [measure_resident(side, new_tokens) for side in (dense, packed)]
    generated = generate_in_turn(dense, packed, new_tokens, rounds)
    rates = [new_tokens / statistics.median(seconds) for seconds in generated.seconds]
    sides = [
        Side(sum(file.stat().st_size for file in side.glob("*.safetensors")), resident, rate)
        for side, resident, rate in zip((dense, packed), residents, rates, strict=True)
    ]
    faster = statistics.median(d / p for d, p in zip(*generated.seconds, strict=True))
    differing = (generated.tokens[0] != generated.tokens[1]).nonzero()
    same = int(differing[0]) if len(differing) else new_tokens
    return Pair(label, *sides, report.packed_bytes / report.dense_bytes, faster, same)


@torch.inference_mode()
def generate_in_turn(dense: Path, packed: Path, new_tokens: int, rounds: int) -> Generated:
    """Generate greedy tokens with the models in two folders, in turn; a first round is not timed."""
    models = [load_model(folder) for folder in (dense, packed)]
    tokens: list[torch.Tensor] = []
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for (model, tokenizer), spent in zip(models, seconds, strict=True):
            ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
            start = time.process_time()
            words = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=tokenizer.eos_token_id,
            )
            if turn:
                spent.append(time.process_time() - start)
            else:
                tokens.append(words[0, ids.shape[1] :])
    return Generated((tokens[0], tokens[1]), seconds)


def table(content: dict[str, Any]) -> list[str]:
    """Both sides in each dtype, as a Markdown table."""
    setting, pairs = content["setting"], content["pairs"]
    sides = [(pair, side) for pair in pairs for side in ("dense", "packed")]
    given = setting["new_tokens"]

    def row(what: str, cells: list[str]) -> str:
        return f"| {what} | {' | '.join(cells)} |"

    def of_side(text: Callable[[dict[str, Any]], str]) -> list[str]:
        return [text(pair[side]) for pair, side in sides]

    def of_packed(text: Callable[[dict[str, Any]], str]) -> list[str]:
        return ["" if side == "dense" else text(pair) for pair, side in sides]

    return [
        row(f"{setting['model']} at {setting['pattern']}", [f"{pair['dtype']}, {side}" for pair, side in sides]),
        "|---" + "|---:" * len(sides) + "|",
        row("tensors on disk", of_side(lambda side: megabytes(side["file_bytes"]))),
        row("packed layers, bytes over dense", of_packed(lambda pair: f"{pair['layer_bytes']:.2f}")),
        row("resident memory after generating", of_side(lambda side: megabytes(side["resident"]["after"]))),
        row("resident memory, maximum", of_side(lambda side: megabytes(side["resident"]["peak"]))),
        row("greedy tokens per second, one thread", of_side(lambda side: f"{side['tokens_per_second']:.1f}")),
        row("tokens per second, over dense", of_packed(lambda pair: f"{pair['faster']:.2f}x")),
        row(f"tokens before the first difference, of {given}", of_packed(lambda pair: f"{pair['same_tokens']}")),
    ]


def megabytes(count: float) -> str:
    """A number of bytes in MB."""
    return f"{count / 1e6:.0f} MB"


def page(content: dict[str, Any]) -> list[str]:
    """docs/sparse.md."""
    setting = content["setting"]
    return [
        "# A pruned model, dense with zeros and packed",
        "",
        f"Measured by `make sparse` on one thread of an {setting['processor']}, torch {setting['torch']}: "
        f"{setting['model']} pruned by {setting['method']} to {setting['pattern']} on {setting['samples']} x "
        f"{setting['length']} tokens. Each side is loaded from its own folder; memory is that of a new process. "
        "Tokens: "
        f'{setting["new_tokens"]}, greedy, after "{setting["prompt"]}"; both sides in turn, medians over '
        f"{setting['rounds']} rounds of CPU time, including the prompt.",
        "",
        *table(content),
    ]


if __name__ == "__main__":
    typer.run(main)
