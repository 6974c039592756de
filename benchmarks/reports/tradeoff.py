"""Perplexity against size and speed: dense, quantized and pruned forms; writes docs/tradeoff.{json,md} and a picture.

    python -m benchmarks.reports.tradeoff --model FOLDER --name NAME --calibration c4.jsonl.gz \
        --evaluation wiki.test.raw.gz --only perplexity
    python -m benchmarks.reports.tradeoff ... --only speed

Results in docs/tradeoff.json are kept, so a stopped run resumes. A perplexity may be measured on a busy machine. A
speed needs an idle one: each round times the dense model in float32 beside the form. ``--list`` names the forms. Those
that are recovered take a training, so they are measured only with ``--form``, as ``--form "8:16 8 bits, recovered"``.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton.commands.report import write_json
from ace_triton.inputs.checkpoint import load
from ace_triton.presets import DEFAULT_PRESET
from ace_triton.provenance import name_of, now
from ace_triton.study.workbench import Protocol, processor_name

from ..harness.resident import PROMPT
from .tradeoff_forms import DENSE_FORM, FORMS, LENGTH, OURS, RECOVERED_FORMS, STEP_FORMS, Form, Forms, Opened
from .tradeoff_page import page
from .tradeoff_picture import picture

STEPS = ("perplexity", "speed")
PICTURE = Path("images/tradeoff.svg")

console = Console()


def main(
    model: Annotated[str, typer.Option(help="Model in all its forms.")] = "smollm2",
    name: Annotated[str, typer.Option(help="The model's name on the page.")] = "SmolLM2-135M",
    calibration: Annotated[str, typer.Option()] = "allenai/c4:en",
    evaluation: Annotated[str, typer.Option(help="A raw WikiText file.")] = "",
    samples: Annotated[int, typer.Option(help="Number of calibration sequences.")] = 128,
    windows: Annotated[int, typer.Option(help="Number of evaluation windows of 512 tokens.")] = 20,
    preset: Annotated[str, typer.Option(help="Preset that prunes.")] = DEFAULT_PRESET,
    only: Annotated[str | None, typer.Option(help="Step: perplexity or speed; neither for the page alone.")] = None,
    most: Annotated[int | None, typer.Option(min=0, help="Largest number of cells to measure; default: all.")] = None,
    form: Annotated[list[str] | None, typer.Option(help="Form to measure, as '8:16 4 bits'; repeatable.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the forms and what is measured, and end.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of a speed.")] = 7,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a round.")] = 64,
    work: Annotated[Path, typer.Option(help="Folder that keeps the forms.")] = Path("build/tradeoff"),
    out: Annotated[Path, typer.Option(help="Folder of tradeoff.json and tradeoff.md.")] = Path("docs"),
) -> None:
    """Measure what is missing, and write the page and the picture."""
    if only is not None and only not in STEPS:
        raise typer.BadParameter(f"--only must be one of {', '.join(STEPS)}; got {only!r}")
    all_forms = (*FORMS, *RECOVERED_FORMS)
    all_forms = all_forms if only == "perplexity" else (*all_forms, *STEP_FORMS)
    unknown = [wanted for wanted in form or () if wanted not in map(str, all_forms)]
    if unknown:
        raise typer.BadParameter(f"--form must be one of {', '.join(map(str, all_forms))}; got {unknown[0]!r}")
    if only is not None and not listed and not evaluation:
        raise typer.BadParameter(
            "--evaluation is missing: name a raw WikiText file (only --list, and the page, need none)"
        )
    content = read(out)
    if listed:
        for entry in all_forms:
            console.print(f"{entry}: {state_of(content, name, entry)}", highlight=False)
        return
    if only is not None:
        protocol = Protocol(
            model, calibration, evaluation, wikitext=True, samples=samples, windows=windows, dtype=torch.float32
        )
        forms = Forms(protocol, preset, work / name)
        found = of_model(content, name, setting_of(protocol, preset))
        found[only] = [entry for entry in found[only] if is_current(entry)]
        known = {Form(**entry["form"]) for entry in found[only]}
        asked = form or [str(entry) for entry in all_forms if entry not in RECOVERED_FORMS]
        wanted = [entry for entry in all_forms if entry not in known and str(entry) in asked]
        for entry in wanted[:most]:
            why_not = forms.why_not(entry)
            if why_not is not None:
                console.print(f"{entry}: left out: {why_not}", highlight=False)
                continue
            measured = (
                perplexity_of(forms, entry) if only == "perplexity" else speed_of(forms, entry, rounds, new_tokens)
            )
            found[only].append({"form": asdict(entry), "head_bits": entry.head_bits, **measured, "date": now()})
            console.print(f"{name}, {entry}: {measured}", highlight=False)
            write_json(out / "tradeoff.json", content)
    write(out, content)


def state_of(content: dict[str, Any], name: str, form: Form) -> str:
    """What is measured of a form, in words."""
    found = content["models"].get(name, {})
    current = [
        step
        for step in STEPS
        if any(Form(**entry["form"]) == form and is_current(entry) for entry in found.get(step, ()))
    ]
    if current:
        return " and ".join(current)
    return "not measured, only with --form" if form in RECOVERED_FORMS else "not measured"


def read(out: Path) -> dict[str, Any]:
    """Earlier results."""
    path = out / "tradeoff.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"models": {}}
    return content


def write(out: Path, content: dict[str, Any]) -> None:
    """Write the page and the picture."""
    (out / "tradeoff.md").write_text(page(content))
    (out / PICTURE).parent.mkdir(exist_ok=True)
    (out / PICTURE).write_text(picture(content))


def setting_of(protocol: Protocol, preset: str) -> dict[str, Any]:
    """What all perplexities of a model are measured with."""
    return {
        "preset": preset,
        "calibration": name_of(protocol.calibration),
        "evaluation": name_of(protocol.evaluation),
        "samples": protocol.samples,
        "length": LENGTH,
        "windows": protocol.windows,
        "window_length": protocol.window_length,
        "processor": processor_name(),
    }


def of_model(content: dict[str, Any], name: str, setting: dict[str, Any]) -> dict[str, Any]:
    """The results of a model; the first call gives them their setting.

    Raises:
        typer.BadParameter: if earlier results have another setting.
    """
    found: dict[str, Any] = content["models"].setdefault(name, {"setting": setting, **{step: [] for step in STEPS}})
    for key, value in found["setting"].items():
        if key != "processor" and setting[key] != value:
            raise typer.BadParameter(
                f"{name} was measured with {key} {value!r}, not {setting[key]!r}: give the same, or remove {name} from "
                "tradeoff.json"
            )
    return found


def is_current(entry: dict[str, Any]) -> bool:
    """False for a form of this package without the compiled step or with other bits of its head.

    It is measured again.
    """
    form = Form(**entry["form"])
    if form.engine != OURS:
        return True
    if "tokens_per_second" in entry and entry.get("decoder") != "compiled":
        return False
    return entry.get("head_bits") == form.head_bits


def perplexity_of(forms: Forms, form: Form) -> dict[str, Any]:
    """Perplexity and size of a form."""
    opened = forms.opened(form, all_logits=True)
    try:
        return {
            "perplexity": opened.perplexity(forms.bench),
            "bytes_per_weight": opened.bytes_per_weight,
            "file_bytes": forms.file_bytes(form),
            "version": opened.version,
        }
    finally:
        opened.close()


def speed_of(forms: Forms, form: Form, rounds: int, new_tokens: int) -> dict[str, Any]:
    """Tokens a second of a form and of the dense model in float32, which run in turn on one thread."""
    torch.set_num_threads(1)
    _, tokenizer = load(forms.protocol.model)
    ids = tokenizer(PROMPT).input_ids
    sides = [forms.opened(entry, all_logits=False) for entry in (DENSE_FORM, form)]
    try:
        speeds = in_turn(sides, ids, rounds, new_tokens)
    finally:
        for side in sides:
            side.close()
    return {
        "tokens_per_second": statistics.median(own for _, own in speeds),
        "over_dense": statistics.median(own / dense for dense, own in speeds),
        "dense_tokens_per_second": statistics.median(dense for dense, _ in speeds),
        "rounds": rounds,
        "new_tokens": new_tokens,
        "decoder": sides[1].decoder,
        "processor": processor_name(),
        "version": sides[1].version,
    }


def in_turn(sides: list[Opened], ids: list[int], rounds: int, new_tokens: int) -> list[tuple[float, ...]]:
    """Tokens a second of each side by round; a first round is not counted."""
    found = [tuple(side.tokens_per_second(ids, new_tokens) for side in sides) for _ in range(rounds + 1)]
    return found[1:]


if __name__ == "__main__":
    typer.run(main)
