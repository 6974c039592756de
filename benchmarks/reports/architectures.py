"""Which encoders, encoder-decoders, and models of images and audio are pruned: a small random model of each.

    python -m benchmarks.reports.architectures

Writes docs/architectures.{json,md}. A model counts as pruned as in benchmarks.reports.families. Each result is written
as soon as it is there, and the same command resumes a run. Causal language models are on the page of families.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from transformers.models.auto import modeling_auto

from ace_triton import ModelReport, prune_model
from ace_triton.commands.report import write_json
from ace_triton.decoders.batches import tensors_in
from ace_triton.errors import AceError

from ..harness.any_models import Inputs, small_any_model
from ..harness.small_models import NotMade
from .families import FAMILIES, Counts, two_of_four

CLASSES: dict[str, tuple[tuple[str, str], ...]] = {
    "encoder": (
        ("AutoModelForMaskedLM", "MASKED_LM"),
        ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
    ),
    "encoder-decoder": (("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),),
    "vision": (
        ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION"),
        ("AutoModelForMaskedImageModeling", "MASKED_IMAGE_MODELING"),
    ),
    "audio": (
        ("AutoModelForAudioClassification", "AUDIO_CLASSIFICATION"),
        ("AutoModelForCTC", "CTC"),
        ("AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ"),
    ),
    "multimodal": (
        ("AutoModelForZeroShotImageClassification", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
        ("AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT"),
    ),
}
"""For each class of models, the AutoModel classes whose families are tried, with transformers' names of their tables. A
family is tried once in a class, with the first that has it. Classifiers with a decoder are left to their classes."""

PLAIN: tuple[tuple[str, str], ...] = (
    (r"requires the (\w+) library", "needs the package {0}, which is not installed here"),
    (r"can't be found|not a local folder|huggingface\.co", "needs a file from the model hub"),
    (r"smallest configuration here has ([\d,]+) parameters", "has {0} parameters in its smallest configuration here"),
    (r"Unrecognized configuration class", "has no model class in transformers for its configuration"),
    (
        r"ValidationError|rope_parameters|context_size|Padding_idx|object has no attribute '(?:num_|intermediate)"
        r"|running_mean|must be int, not NoneType",
        "its configuration accepts none of the small sizes that were tried",
    ),
    (
        r"missing \d+ required positional argument: '(\w+)'|by a usual name",
        "its forward needs an input that is neither text, images nor audio by the usual names",
    ),
    (
        r"Output\w*' object has no attribute",
        "its forward in this version of transformers ends in an error on any input",
    ),
    (
        r"no linear layers, and only linear layers are pruned; their weights are in ([\w ]+)",
        "the blocks have no linear layers, and only linear layers are pruned; their weights are in {0}",
    ),
    (
        r"can be pruned with these settings: its weight is tied",
        "two towers share every weight of their blocks, and shared weights stay dense",
    ),
)
"""Plain reasons why a family was not made or not pruned, by a pattern of the error; the first one that fits counts."""

OTHER_REASON = "none of the inputs that were tried fits its forward"
NOT_PRUNED_REASON = "ace_triton raised an error or left a wrong result: {0}"

OPTIONS: dict[str, Any] = {"method": "ace", "sparsity": "2:4", "update": "rescale"}
console = Console()


def names_of(kind: str) -> dict[str, str]:
    """The families of a class, each with the AutoModel class that makes it."""
    decoders = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    found: dict[str, str] = {}
    for auto_class, table in CLASSES[kind]:
        for name in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES"):
            if table != "SEQUENCE_CLASSIFICATION" or name not in decoders:
                found.setdefault(name, auto_class)
    return found


def judge(name: str, auto_class: str) -> dict[str, Any]:
    """Prune a small model of a family, and look at what is left of it."""
    made = small_any_model(name, auto_class)
    if isinstance(made, NotMade):
        return {"outcome": "not made", "reason": made.reason}
    model, inputs = made
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = prune_model(model, [inputs], **OPTIONS)
        wrong = _wrong(model, inputs, report)
    except Exception as error:
        kind = "" if isinstance(error, AceError) else f"{type(error).__name__}: "
        return {"outcome": "not pruned", "reason": kind + " ".join(str(error).split())}
    if wrong:
        return {"outcome": "wrong", "reason": wrong}
    whole = any("the whole model is run" in str(warning.message) for warning in caught)
    dense = sorted({re.sub(r"tied to .*", "tied to another layer's", entry.reason) for entry in report.skipped})
    return {
        "outcome": "pruned",
        "layers": len(report.layers),
        "towers": [tower.name for tower in report.towers if tower.run != "unreached"],
        "unreached": [tower.name for tower in report.towers if tower.run == "unreached"],
        "share": report.account.share("pruned"),
        "whole": whole,
        "dense": dense,
    }


def _wrong(model: Any, inputs: Inputs, report: ModelReport) -> str | None:
    """What is wrong with a pruned model; None if nothing is."""
    unfit = [layer.name for layer in report.layers if not two_of_four(model, layer)]
    if unfit:
        return f"not 2:4: {unfit[0]} and {len(unfit) - 1} more"
    with torch.no_grad():
        outputs = list(tensors_in(dict(model(**inputs))))
    if not all(bool(tensor.isfinite().all()) for tensor in outputs if tensor.is_floating_point()):
        return "outputs that are not finite"
    account = report.account
    return None if account.pruned == sum(layer.parameters for layer in report.layers) else f"the account: {account}"


def page(content: dict[str, dict[str, dict[str, Any]]], causal: Counts | None = None) -> list[str]:
    """docs/architectures.md, with the counts of the page of causal language models if they are known."""
    asked = ", ".join(f"{key}={value!r}" for key, value in OPTIONS.items())
    lines = [
        "# Architectures",
        "",
        "Written by `make architectures`: a small random model of the families in transformers "
        f"{transformers.__version__} that read text, images or audio, pruned on random inputs by "
        f"`prune_model(model, batches, {asked})`. Counted as pruned: at most two of every four weights left in every "
        "layer of the report, an account that adds up, and finite outputs. Causal language models have "
        "[a page of their own](families.md). A real checkpoint may differ from a small one.",
        "",
        "| class | tried | pruned | not pruned | no small model made |",
        "|---|---:|---:|---:|---:|",
    ]
    if causal is not None:
        families = causal.pruned + causal.not_pruned + causal.not_judged
        lines.append(
            f"| [causal](families.md) | {families} of {families} | {causal.pruned} | {causal.not_pruned} "
            f"| {causal.not_judged} |"
        )
    for kind, found in content.items():
        counts = Counter(result["outcome"] for result in found.values())
        failed = counts["not pruned"] + counts["wrong"]
        tried = f"{len(found)} of {len(names_of(kind))}"
        lines.append(f"| {kind} | {tried} | {counts['pruned']} | {failed} | {counts['not made']} |")
    for kind, found in content.items():
        lines += ["", f"## {kind.capitalize()}", "", *_class_lines(found)]
    return lines


def _class_lines(found: dict[str, dict[str, Any]]) -> Sequence[str]:
    pruned = {name: result for name, result in found.items() if result["outcome"] == "pruned"}
    several = {name: len(result["towers"]) for name, result in pruned.items() if len(result["towers"]) > 1}
    unreached = [name for name, result in pruned.items() if result["unreached"]]
    lines = [f"- **Pruned** ({len(pruned)}): {', '.join(pruned) or 'none'}."]
    if several:
        lines.append("- **Several towers**: " + ", ".join(f"{name} ({count})" for name, count in several.items()) + ".")
    if unreached:
        lines.append(f"- **With blocks that these inputs do not reach**: {', '.join(unreached)}.")
    low = {name: result for name, result in pruned.items() if result["share"] < 0.95}
    if low:
        shares = [f"{name} {result['share']:.0%} ({'; '.join(result['dense'])})" for name, result in low.items()]
        lines.append(f"- **Less than 95% of their blocks' matrices pruned**: {', '.join(shares)}.")
    outcomes = (
        ({"not pruned", "wrong"}, "**Not pruned**", ""),
        ({"not made"}, "**No small model made**", ", so not tried"),
    )
    for kinds, title, end in outcomes:
        reasons: dict[str, list[str]] = {}
        for name, result in found.items():
            if result["outcome"] in kinds:
                reasons.setdefault(plain_reason(result["reason"], made=not end), []).append(name)
        if reasons:
            lines.append(f"- {title} ({sum(map(len, reasons.values()))}){end}:")
            lines += [
                f"    - {_as_text(reason.rstrip('.:'))}: {', '.join(names)}." for reason, names in reasons.items()
            ]
    return lines


def plain_reason(error: str, *, made: bool = False) -> str:
    """Why no small model of a family was made, or why it was not pruned, as a plain clause about the family."""
    for pattern, words in PLAIN:
        if found := re.search(pattern, error):
            return words.format(*found.groups())
    return NOT_PRUNED_REASON.format(error) if made else OTHER_REASON


def _as_text(message: str) -> str:
    """A message in which Markdown sees no link: two indexes in a row, ``[a][b]``, would be one."""
    return message.replace("[", r"\[")


def main(
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Classes to try; default: all.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Families to try; default: all.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also try again what was not made or not pruned.")] = False,
    families: Annotated[Path, typer.Option(help="Page of causal language models, for their counts.")] = FAMILIES,
    out: Annotated[Path, typer.Option(help="Where to write, without the suffix.")] = Path("docs/architectures"),
) -> None:
    """Try every family that was not tried yet; write OUT.json and OUT.md."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    path = out.with_suffix(".json")
    content = json.loads(path.read_text()) if path.is_file() else {}
    for kind in kinds or CLASSES:
        found = content.setdefault(kind, {})
        for name, auto_class in names_of(kind).items():
            known = name in found and not (again and found[name]["outcome"] != "pruned")
            if not known and (only is None or name in only):
                found[name] = judge(name, auto_class)
                console.print(kind, name, found[name]["outcome"], found[name].get("reason", ""), highlight=False)
                write_json(path, content)
    causal = Counts.of_page(families) if families.is_file() else None
    out.with_suffix(".md").write_text("\n".join(page(content, causal)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
