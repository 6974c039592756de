"""The model card: the README.md that is written beside a pruned or packed model."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ..structures.uneven import SHAPES

CARD_FILE = "README.md"
TEXT_GENERATION = "text-generation"
LARGEST_CARD = 2**20
"""A source's card is read up to this many bytes."""

_LICENSE = re.compile(r"^license:\s*[\"']?([\w.+-]+)[\"']?\s*$", re.MULTILINE)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_DENSE = """The model is a dense checkpoint with zeros, which takes the memory and time of the dense model:

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/to/this/folder")
```

If its pattern is n:m, `ace-triton pack{bits}` makes a smaller checkpoint of it that runs sparse.
"""

_SMALLER = """The model is an ordinary dense checkpoint, with fewer channels, attention heads, experts or blocks than
its source:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

`ace-triton prune` prunes it further, to n:m.
"""

_UNEVEN = """The model is a dense checkpoint whose feed-forwards have different widths, which config.json lists. It
needs the package ace-triton:

```python
import ace_triton

model, tokenizer = ace_triton.load_model("path/to/this/folder")
```
"""

_PACKED = """The model is a packed checkpoint. It needs the package ace-triton:

```python
import ace_triton

model = ace_triton.load("path/to/this/folder")
```

After `import ace_triton`, `{auto_class}.from_pretrained` of transformers loads it too.
"""


def license_of(folder: Path) -> str | None:
    """The license that a model's card names in its metadata; None if there is no card or it names none."""
    try:
        with (folder / CARD_FILE).open(encoding="utf-8", errors="replace") as file:
            text = file.read(LARGEST_CARD)
    except OSError:
        return None
    found = _LICENSE.search(_metadata(text))
    return None if found is None else found[1]


def write_card(folder: Path, report: dict[str, Any]) -> None:
    """Write the model card of a saved model. A card that is in the folder stays, and so does a link of its name.

    A card has no date, no times and not the folder's name, so equal runs write equal cards.

    Args:
        folder: the saved model, complete except for its reports.
        report: the pruning report, which may lack any part.
    """
    if not os.path.lexists(folder / CARD_FILE):  # A link that leads nowhere would be followed.
        (folder / CARD_FILE).write_text(_card(report, _exported(report) or _usage(folder, report)), encoding="utf-8")


def _card(report: dict[str, Any], usage: str | None) -> str:
    source, pattern = _text(report, "source") or "A model", _text(report, "sparsity")
    what = "made smaller by structured pruning" if _dict(report, "shrink") else "written by ace-triton"
    if not (pattern or _dict(report, "shrink")) and (bits := _all_in(report)):
        what = f"stored in {bits} bits"
    title = f"{source} pruned to {pattern}" if pattern else f"{source} {what}"
    parts = [_front(report), f"# {title}\n"]
    rows = [f"| {title} | {value} |" for title, value in _rows(report)]
    if rows:
        parts.append("\n".join(["| | |", "|---|---|", *rows]) + "\n")
    if usage is not None:
        parts.append("## Use\n\n" + usage)
    if recipe := _dict(report, "recipe"):
        rest = ", not the recovery that followed" if _dict(report, "recovery") else ""
        parts.append(
            "## Recipe\n\n`ace_triton.json` holds the recipe of the pruning and the full report. "
            f"`ace-triton prune SOURCE OUT --recipe ace_triton.json` repeats the pruning{rest}.\n\n"
            f"```json\n{json.dumps(recipe, indent=2)}\n```\n"
        )
    return "\n".join(parts)


def _front(report: dict[str, Any]) -> str:
    """The metadata that model hubs read."""
    source, pattern = _text(report, "source"), _text(report, "sparsity")
    lines = ["---"]
    if license := _text(report, "source_license"):
        lines.append(f"license: {license}")
    if source and "source_path" not in report and _HUB_NAME.fullmatch(source):
        lines.append(f"base_model: {source}")
    task = _text(report, "task") or TEXT_GENERATION
    lines += ["library_name: transformers", f"pipeline_tag: {task}", "tags:", "- ace-triton"]
    lines.append("- quantized" if _all_in(report) and not pattern else "- pruned")
    if pattern:
        lines.append(f'- "{pattern}"')
    return "\n".join([*lines, "---\n"])


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table: title and value."""
    update, calibration, recovery = (_dict(report, key) for key in ("update", "calibration_report", "recovery"))
    permutation = _dict(report, "permutation")
    rows = [
        ("Source", _text(report, "source")),
        ("License of the source", _text(report, "source_license")),
        ("Method", _text(report, "method")),
        ("Pattern", _text(report, "sparsity")),
        ("Update of the kept weights", _text(update, "kind")),
        ("Quantization of the kept weights", _quantization(quantize_entry(report))),
        ("Packed", _packed(report)),
        ("Channels reordered", None if not permutation else "yes"),
        ("Budgets", _text(report, "budgets")),
        *_removed(report),
        *_amounts(report),
    ]
    if {"sequences", "length", "source"} <= calibration.keys():
        words = f"{calibration['sequences']} sequences of {calibration['length']} tokens from {calibration['source']}"
        rows.append(("Calibration", words))
    if (inputs := _dict(calibration, "inputs")) and "source" in calibration:
        amounts = ", ".join(f"{count} {what}" for what, count in inputs.items())
        rows.append(("Calibration", f"{amounts} from {calibration['source']}"))
    if isinstance(perplexity := calibration.get("perplexity"), float):
        rows.append(("Perplexity of the dense model on it", f"{perplexity:.4g}"))
    if {"steps", "tokens"} <= recovery.keys():
        rows.append(("Recovery", f"{recovery['steps']} optimizer steps, {recovery['tokens']} tokens"))
    if (losses := recovery.get("losses")) and isinstance(losses, list) and isinstance(losses[-1], float):
        rows.append(("Loss in the last step of recovery", f"{losses[-1]:.4g} nats per token"))
    return [(title, value) for title, value in rows if value]


def _removed(report: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Rows of what structured pruning removed."""
    shrink = _dict(report, "shrink")
    names = {
        "channels": "Feed-forward width",
        "groups": "Key-value groups in a block",
        "experts": "Experts in a mixture",
        "expert_channels": "Width of an expert",
    }
    rows = [("Structured pruning", _text(_dict(shrink, "settings"), "method"))]
    rows.append(("Update after structured pruning", _text(_dict(shrink, "settings"), "update")))
    if isinstance(removed := shrink.get("removed"), float):
        rows.append(("Removed, of the blocks' parameters", f"{removed:.1%}"))
    for kind, counts in _dict(shrink, "widths").items():
        if isinstance(counts, list) and len(counts) == 2 and counts[0] != counts[1]:
            rows.append((names.get(kind, kind.capitalize()), f"{counts[1]} of {counts[0]}"))
    for which, found in _dict(report, "perplexity").items():
        if isinstance(found, dict) and isinstance(value := found.get("perplexity"), float):
            rows.append((f"Perplexity {which} structured pruning", f"{value:.4g}"))
    return rows


def _amounts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of how many weights were pruned."""
    layers = report.get("layers")
    try:
        sizes = [(float(layer["kept"]), int(layer["parameters"])) for layer in layers or ()]
        whole = int(_dict(report, "account").get("model", 0))
    except (TypeError, KeyError, ValueError):
        return []
    pruned = sum((1 - kept) * size for kept, size in sizes)
    if not pruned:
        return []
    of_layers = f"{pruned / sum(size for _, size in sizes):.1%} of their weights"
    of_model = f", {pruned / whole:.1%} of the model's" if whole else ""
    return [("Pruned layers", str(len(sizes))), ("Zeros", of_layers + of_model)]


def _packed_layers(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the report says of packed layers, by pattern and bits."""
    kinds = report.get("packed_layers")
    return [kind for kind in kinds if isinstance(kind, dict)] if isinstance(kinds, list) else []


def _packed(report: dict[str, Any]) -> str | None:
    """How layers are packed, as in "210 layers 2:4 in 8 bits; lm_head, not pruned, in 8 bits"."""
    found = []
    for kind in _packed_layers(report):
        name, count, pattern, bits = (kind.get(entry) for entry in ("name", "layers", "pattern", "bits"))
        pruned = f" {pattern}" if pattern != "dense" else ", not pruned,"
        found.append(f"{name or f'{count} layers'}{pruned}{f' in {bits} bits' if bits else ''}")
    return "; ".join(found) or None


def _all_in(report: dict[str, Any]) -> int | None:
    """The bits of all packed layers, if they are the same and none was pruned; else None."""
    kinds = {(kind.get("pattern"), kind.get("bits")) for kind in _packed_layers(report)}
    (pattern, bits) = next(iter(kinds)) if len(kinds) == 1 else (None, None)
    return bits if pattern == "dense" and isinstance(bits, int) else None


def _exported(report: dict[str, Any]) -> str | None:
    """What an exported folder holds; None if the report is not of an export."""
    export = _dict(report, "export")
    engine, weight_type = _text(export, "engine"), _text(export, "weight_type")
    if engine is None:
        return None
    return (
        f"The folder holds the files for {engine} that `ace-triton export` wrote: dense weights of type {weight_type}, "
        "with zeros. transformers and ace-triton load the model that they were made from.\n"
    )


def _usage(folder: Path, report: dict[str, Any]) -> str | None:
    """How a folder is loaded, as its configuration and its report say; None if it has no configuration."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    method = _dict(config, "quantization_config").get("quant_method")
    dense = _SMALLER if _dict(report, "shrink") and not _text(report, "sparsity") else _DENSE
    dense = _UNEVEN if _dict(config, SHAPES) else dense
    usage = _PACKED if method == "ace_triton" else dense if method is None else None
    by = quantize_entry(report)
    bits = "" if _quantization(by) is None else f" --bits {by['bits']} --group {by['group']}"
    auto_class = _text(report, "auto_class") or "AutoModelForCausalLM"
    return None if usage is None else usage.format(auto_class=auto_class, bits=bits)


def _metadata(text: str) -> str:
    """The lines between the two "---" at the beginning of a card."""
    parts = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
    return parts[1] if len(parts) == 3 and not parts[0].strip() else ""


def quantize_entry(report: Any) -> dict[str, Any]:
    """How a report says that the kept weights are quantized: by the last recovery or by pruning; empty if neither."""
    return _dict(_dict(_dict(report, "recovery"), "settings"), "quantize") or _dict(_dict(report, "recipe"), "quantize")


def _quantization(by: dict[str, Any]) -> str | None:
    """The words for an entry "quantize" of a recipe; None if it has other content."""
    bits, group, rule = by.get("bits"), by.get("group"), _text(by, "rule")
    if not isinstance(bits, int) or not isinstance(group, int) or rule is None:
        return None
    return f"{bits} bits, groups of {group} inputs, by {rule}"


def _text(report: dict[str, Any], key: str) -> str | None:
    """A value if it is text of one line, else None."""
    value = report.get(key)
    return value if isinstance(value, str) and len(value.splitlines()) == 1 else None


def _dict(report: Any, key: str) -> dict[str, Any]:
    """A value if it is an object, else an empty one."""
    value = report.get(key) if isinstance(report, dict) else None
    return value if isinstance(value, dict) else {}
