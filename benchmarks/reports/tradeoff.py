"""Perplexity against size and speed: dense, quantized and pruned forms; writes docs/tradeoff.{json,md} and a picture.

    python -m benchmarks.reports.tradeoff --model FOLDER --name NAME --calibration c4.jsonl.gz \
        --evaluation wiki.test.raw.gz --only perplexity
    python -m benchmarks.reports.tradeoff ... --only speed

Results in docs/tradeoff.json are kept, so a stopped run resumes. A perplexity may be measured on a busy machine. A
speed needs an idle one: each round times the dense model in float32 beside the form. Speeds are kept by processor and
instruction set; ``--show`` chooses those of the picture and the README. ``--list`` names the forms. Those that are
recovered take a training, so they are measured only with ``--form``, as ``--form "8:16 8 bits, recovered"``.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
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
from ace_triton.study.workbench import Protocol

from ..harness.resident import PROMPT
from .machines import find_machine, this_machine, title
from .record import read_record
from .tradeoff_forms import DENSE_FORM, FORMS, LENGTH, OURS, RECOVERED_FORMS, STEP_FORMS, Form, Forms, Opened
from .tradeoff_page import page
from .tradeoff_picture import picture

STEPS = ("perplexity", "speed")
EMPTY: dict[str, list[dict[str, Any]]] = {"perplexity": [], "machines": []}
"""The results of a model of which nothing is measured."""
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
    show: Annotated[
        str | None,
        typer.Option(help="Machine whose speeds the picture and the README show, as on the page; kept in the record."),
    ] = None,
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
    if show is not None:
        choose_shown(content, show)
        write_json(out / "tradeoff.json", content)
        write(out, content)
    if listed:
        for entry in all_forms:
            console.print(f"{entry}: {state_of(content, name, entry)}", highlight=False, soft_wrap=True)
        return
    if only is not None:
        protocol = Protocol(
            model, calibration, evaluation, wikitext=True, samples=samples, windows=windows, dtype=torch.float32
        )
        forms = Forms(protocol, preset, work / name)
        found = of_model(content, name, setting_of(protocol, preset))
        asked = form or [str(entry) for entry in all_forms if entry not in RECOVERED_FORMS]
        wanted = [entry for entry in missing_of(results_of(found, only), all_forms) if str(entry) in asked]
        for entry in wanted[:most]:
            why_not = forms.why_not(entry)
            if why_not is not None:
                console.print(f"{entry}: left out: {why_not}", highlight=False)
                continue
            measured = (
                perplexity_of(forms, entry) if only == "perplexity" else speed_of(forms, entry, rounds, new_tokens)
            )
            add_result(found, only, {"form": asdict(entry), "head_bits": entry.head_bits, **measured, "date": now()})
            console.print(f"{name}, {entry}: {measured}", highlight=False)
            show_first(content)
            write_json(out / "tradeoff.json", content)
    write(out, content)


def choose_shown(content: dict[str, Any], wanted: str) -> None:
    """Name the machine whose speeds the picture and the README show.

    Raises:
        typer.BadParameter: if no speed was measured on this machine.
    """
    known = {title(m["environment"]) for found in content["models"].values() for m in found["machines"]}
    if wanted not in known:
        names = "; ".join(map(repr, sorted(known))) or "none yet"
        raise typer.BadParameter(f"--show must be a machine whose speeds were measured ({names}); got {wanted!r}")
    content["shown"] = wanted


def show_first(content: dict[str, Any]) -> None:
    """If no machine was chosen, choose the first with speeds."""
    machines = (machine for found in content["models"].values() for machine in found["machines"])
    first = next(machines, None)
    if first is not None:
        content.setdefault("shown", title(first["environment"]))


def results_of(found: dict[str, Any], step: str) -> list[dict[str, Any]]:
    """The results of a model from a step: its perplexities, or its speeds on this machine."""
    holder = found if step == "perplexity" else find_machine(found["machines"], this_machine())
    results: list[dict[str, Any]] = [] if holder is None else holder[step]
    return results


def missing_of(results: Sequence[dict[str, Any]], forms: Sequence[Form]) -> list[Form]:
    """The forms that are to be measured, again or for the first time."""
    current = {Form(**entry["form"]) for entry in results if is_current(entry)}
    return [form for form in forms if form not in current]


def add_result(found: dict[str, Any], step: str, result: dict[str, Any]) -> None:
    """Add a result of a step to a model's, in place of an earlier one of the same form (on this machine)."""
    form = Form(**result["form"])
    results = [*(entry for entry in results_of(found, step) if Form(**entry["form"]) != form), result]
    if step == "perplexity":
        found["perplexity"] = results
    elif (machine := find_machine(found["machines"], this_machine())) is not None:
        machine["speed"] = results
    else:
        found["machines"].append({"environment": this_machine(), "speed": results})


def state_of(content: dict[str, Any], name: str, form: Form) -> str:
    """What is measured of a form, in words."""
    found = content["models"].get(name, EMPTY)
    measured = {"perplexity": found["perplexity"]}
    measured |= {f"speed on {title(m['environment'])}": m["speed"] for m in found["machines"]}
    current = [what for what, results in measured.items() if not missing_of(results, [form])]
    if current:
        return "; ".join(current)
    return "not measured, only with --form" if form in RECOVERED_FORMS else "not measured"


def read(out: Path) -> dict[str, Any]:
    """Earlier results."""
    return read_record(out / "tradeoff.json", models={})


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
    }


def of_model(content: dict[str, Any], name: str, setting: dict[str, Any]) -> dict[str, Any]:
    """The results of a model; the first call gives them their setting.

    Raises:
        typer.BadParameter: if earlier results have another setting.
    """
    found: dict[str, Any] = content["models"].setdefault(name, {"setting": setting, **copy.deepcopy(EMPTY)})
    for key, value in found["setting"].items():
        if setting[key] != value:
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
        "version": sides[1].version,
    }


def in_turn(sides: list[Opened], ids: list[int], rounds: int, new_tokens: int) -> list[tuple[float, ...]]:
    """Tokens a second of each side by round; a first round is not counted."""
    found = [tuple(side.tokens_per_second(ids, new_tokens) for side in sides) for _ in range(rounds + 1)]
    return found[1:]


if __name__ == "__main__":
    typer.run(main)
