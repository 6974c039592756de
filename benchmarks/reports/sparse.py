"""A model pruned to 2:4, dense with zeros and packed: bytes, memory, tokens, a prompt; writes docs/sparse.{json,md}.

    python -m benchmarks.reports.sparse

Each form is loaded from its own folder. Memory is measured in a new process for each. Tokens are greedy, in one
sequence, on one thread; all forms run in turn. Rates are of CPU time and include the prompt. A long prompt is timed by
itself: one forward.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
PROMPT_LENGTH = 512
FORMS: dict[str, dict[str, Any] | None] = {"dense": None, "packed": {}, "packed, 8 bits": {"bits": 8}}
"""Options of ``pack_model`` by form; None is not packed."""
console = Console()


@dataclass(frozen=True)
class Measured:
    """One form of the pruned model.

    Attributes:
        file_bytes: bytes of its tensors on disk.
        layer_bytes: bytes of the pruned layers over their dense bytes.
        resident: memory of a process that loads it and generates.
        tokens_per_second: median over rounds.
        faster: tokens per second over those of the dense form, median over rounds.
        same_tokens: number of generated tokens before the first difference from the dense form's.
        prompt_seconds: of a forward of PROMPT_LENGTH tokens, median over rounds.
        prompt_faster: the dense form's seconds over these, median over rounds.
    """

    file_bytes: int
    layer_bytes: float
    resident: Resident
    tokens_per_second: float
    faster: float
    same_tokens: int
    prompt_seconds: float
    prompt_faster: float


@dataclass(frozen=True)
class Run:
    """What one form generated, and its CPU seconds by round.

    Attributes:
        tokens: int64 [new_tokens].
        seconds: of generating them.
        prompt_seconds: of the long prompt.
    """

    tokens: torch.Tensor
    seconds: list[float]
    prompt_seconds: list[float]


def main(
    model: Annotated[str, typer.Option()] = "smollm2",
    calibration: Annotated[str, typer.Option()] = "pydoc:calibration",
    method: Annotated[str, typer.Option()] = "wanda",
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help="fp32 or bf16; default: both.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write, without the suffix.")] = Path("docs/sparse"),
) -> None:
    """Prune, save all forms and measure them; write OUT.json and OUT.md."""
    torch.set_num_threads(1)
    pruned, tokenizer = checkpoint.load(model)
    ids = load_calibration(calibration, tokenizer, samples=SAMPLES, length=LENGTH).ids
    prune_model(pruned, ids, method, PATTERN, sequential="none")
    with tempfile.TemporaryDirectory() as folder:
        forms = {
            label: measure(
                pruned.to(DTYPES[label]), tokenizer, Path(folder) / label, long_prompt(ids), new_tokens, rounds
            )
            for label in dtypes or DTYPES
        }
    setting = {
        "model": "SmolLM2-135M" if model == "smollm2" else Path(model).name,
        "pattern": PATTERN,
        "method": method,
        "samples": SAMPLES,
        "length": LENGTH,
        "prompt": PROMPT,
        "new_tokens": new_tokens,
        "prompt_length": PROMPT_LENGTH,
        "rounds": rounds,
        "processor": processor(),
        "torch": torch.__version__,
    }
    content = {
        "setting": setting,
        "forms": {label: {form: asdict(found) for form, found in of.items()} for label, of in forms.items()},
    }
    write_json(out.with_suffix(".json"), content)
    lines = page(content)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    for line in lines:
        console.print(line, highlight=False)


def long_prompt(ids: torch.Tensor) -> torch.Tensor:
    """The first tokens of calibration sequences, int64 [1, PROMPT_LENGTH]."""
    return ids.reshape(1, -1)[:, :PROMPT_LENGTH]


def measure(
    model: Any, tokenizer: Any, folder: Path, prompt: torch.Tensor, new_tokens: int, rounds: int
) -> dict[str, Measured]:
    """Save all forms of a pruned model under ``folder`` and measure them.

    Args:
        model: the pruned model, dense.
        tokenizer: its tokenizer.
        folder: gets a folder for each form.
        prompt: int64 [1, n_tokens], the long prompt.
        new_tokens: number of tokens to generate.
        rounds: number of rounds that are timed.
    """
    layer_bytes = {}
    for form, options in FORMS.items():
        place = folder / form
        if options is None:
            checkpoint.save(model, tokenizer, place, {})
            layer_bytes[form] = 1.0
        else:
            sparse, _ = checkpoint.load(folder / "dense")
            report = pack_model(sparse, **options)
            save_packed(sparse, tokenizer, place)
            layer_bytes[form] = report.packed_bytes / report.dense_bytes
    residents = {form: measure_resident(folder / form, new_tokens) for form in FORMS}
    runs = dict(zip(FORMS, run_in_turn([folder / form for form in FORMS], prompt, new_tokens, rounds), strict=True))
    dense = runs["dense"]
    return {
        form: Measured(
            sum(file.stat().st_size for file in (folder / form).glob("*.safetensors")),
            layer_bytes[form],
            residents[form],
            new_tokens / statistics.median(run.seconds),
            ratio(dense.seconds, run.seconds),
            tokens_in_common(dense.tokens, run.tokens),
            statistics.median(run.prompt_seconds),
            ratio(dense.prompt_seconds, run.prompt_seconds),
        )
        for form, run in runs.items()
    }


def ratio(dense: Sequence[float], other: Sequence[float]) -> float:
    """The median of the ratios of two forms' seconds, round by round."""
    return statistics.median(d / o for d, o in zip(dense, other, strict=True))


def tokens_in_common(one: torch.Tensor, other: torch.Tensor) -> int:
    """The number of tokens before the first difference."""
    differing = (one != other).nonzero()
    return int(differing[0]) if len(differing) else len(one)


@torch.inference_mode()
def run_in_turn(folders: Sequence[Path], prompt: torch.Tensor, new_tokens: int, rounds: int) -> list[Run]:
    """Generate greedy tokens and run a long prompt with models of some folders, in turn; a first round is not timed."""
    models = [load_model(folder) for folder in folders]
    runs: list[Run] = []
    for turn in range(rounds + 1):
        for i, (model, tokenizer) in enumerate(models):
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
            generated = time.process_time()
            model(prompt, logits_to_keep=1)
            end = time.process_time()
            if turn:
                runs[i].seconds.append(generated - start)
                runs[i].prompt_seconds.append(end - generated)
            else:
                runs.append(Run(words[0, ids.shape[1] :], [], []))
    return runs


def table(content: Mapping[str, Any]) -> list[str]:
    """All forms in each dtype, as a Markdown table."""
    setting = content["setting"]
    columns = [(f"{label}, {form}", found) for label, of in content["forms"].items() for form, found in of.items()]

    def row(what: str, text: Callable[[Mapping[str, Any]], str], *, of_dense: bool = True) -> str:
        cells = [text(found) if of_dense or not name.endswith("dense") else "" for name, found in columns]
        return f"| {what} | {' | '.join(cells)} |"

    return [
        f"| {setting['model']} at {setting['pattern']} | {' | '.join(name for name, _ in columns)} |",
        "|---" + "|---:" * len(columns) + "|",
        row("tensors on disk", lambda found: megabytes(found["file_bytes"])),
        row("packed layers, bytes over dense", lambda found: f"{found['layer_bytes']:.2f}", of_dense=False),
        row("resident memory after generating", lambda found: megabytes(found["resident"]["after"])),
        row("resident memory, maximum", lambda found: megabytes(found["resident"]["peak"])),
        row("greedy tokens per second, one thread", lambda found: f"{found['tokens_per_second']:.1f}"),
        row("tokens per second, over dense", lambda found: f"{found['faster']:.2f}x", of_dense=False),
        row(
            f"tokens before the first difference, of {setting['new_tokens']}",
            lambda found: str(found["same_tokens"]),
            of_dense=False,
        ),
        row(
            f"a prompt of {setting['prompt_length']} tokens, one thread",
            lambda found: f"{found['prompt_seconds'] * 1000:.0f} ms",
        ),
        row("the dense time of the prompt over this", lambda found: f"{found['prompt_faster']:.2f}x", of_dense=False),
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
        f"{setting['length']} tokens. Each form is loaded from its own folder; memory is that of a new process. "
        "Tokens: "
        f'{setting["new_tokens"]}, greedy, after "{setting["prompt"]}"; all forms in turn, medians over '
        f"{setting['rounds']} rounds of CPU time, including that prompt. The long prompt is one forward.",
        "",
        *table(content),
    ]


if __name__ == "__main__":
    typer.run(main)
