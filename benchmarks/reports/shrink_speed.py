"""Perplexity at equal speed: shrunken, pruned to n:m, and both; writes docs/shrink-speed.{json,md} and a picture.

    python -m benchmarks.reports.shrink_speed --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz --only perplexity
    python -m benchmarks.reports.shrink_speed ... --only speed --again

Results in docs/shrink-speed.json are kept, so a stopped run resumes. A perplexity may be measured on a busy machine.
Speeds are in CPU time, each round beside the dense model, and need an idle machine: ``--again`` replaces those of a
busy one.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton.commands.report import write_json
from ace_triton.decoding.generate import compiled_generate
from ace_triton.evaluate import perplexity
from ace_triton.formats.registry import load_model
from ace_triton.inputs import checkpoint
from ace_triton.inputs.output_folder import files_in
from ace_triton.packed.pack_model import pack_model
from ace_triton.packed.saving import save_packed
from ace_triton.presets import BALANCED, replaced
from ace_triton.provenance import name_of, now
from ace_triton.prune_blocks import prune_model
from ace_triton.solvers.quantize import GROUP
from ace_triton.structures.budget import n_parameters
from ace_triton.structures.ranking import Earlier
from ace_triton.structures.run import Run
from ace_triton.structures.settings import ShrinkSettings
from ace_triton.study.workbench import Protocol, Workbench, processor_name

from ..harness.resident import PROMPT
from .record import read_record
from .shrink_speed_page import BITS, DENSE, FORMS, Form, page, picture

STEPS = ("perplexity", "speed")
PICTURE = Path("images/shrink-speed.svg")
LENGTH, SEED = 128, 0
"""Tokens of a calibration sequence, and the seed of the samples."""

console = Console()


def main(
    calibration: Annotated[str, typer.Option()],
    evaluation: Annotated[str, typer.Option(help="A raw WikiText file.")],
    model: Annotated[str, typer.Option(help="The model in float32.")] = "smollm2",
    name: Annotated[str, typer.Option(help="The model's name on the page.")] = "SmolLM2-135M",
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration sequences.")] = 64,
    windows: Annotated[int, typer.Option(min=1, help="Number of evaluation windows of 512 tokens.")] = 10,
    only: Annotated[str | None, typer.Option(help="Step: perplexity or speed; default: both.")] = None,
    form: Annotated[list[str] | None, typer.Option(help="Form to measure, by name; repeatable.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure speeds again that are in the record.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of a speed.")] = 7,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a round.")] = 64,
    work: Annotated[Path, typer.Option(help="Folder that keeps the forms.")] = Path("build/shrink-speed"),
    out: Annotated[Path, typer.Option(help="Folder of shrink-speed.json and shrink-speed.md.")] = Path("docs"),
) -> None:
    """Measure what is missing, and write the page and the picture."""
    if only is not None and only not in STEPS:
        raise typer.BadParameter(f"--only must be one of {', '.join(STEPS)}; got {only!r}")
    unknown = [wanted for wanted in form or () if wanted not in map(str, FORMS)]
    if unknown:
        raise typer.BadParameter(f"--form must be one of {', '.join(map(str, FORMS))}; got {unknown[0]!r}")
    torch.set_num_threads(1)
    record = read_record(out / "shrink-speed.json", models={})
    protocol = Protocol(
        model, calibration, evaluation, wikitext=True, samples=samples, windows=windows, dtype=torch.float32
    )
    found = of_model(record, name, setting_of(protocol))
    forms = Forms(protocol, work / name)
    chosen = [entry for entry in FORMS if not form or str(entry) in form]
    for step in STEPS if only is None else (only,):
        if again and step == "speed":
            found[step] = [entry for entry in found[step] if Form(**entry["form"]) not in chosen]
        known = {Form(**entry["form"]) for entry in found[step]}
        for entry in (entry for entry in chosen if entry not in known):
            values = forms.perplexity(entry) if step == "perplexity" else forms.speed(entry, rounds, new_tokens)
            found[step].append({"form": asdict(entry), **values, "date": now()})
            console.print(f"{name}, {entry}: {values}", highlight=False)
            write_json(out / "shrink-speed.json", record)
    write(out, record)


def write(out: Path, record: dict[str, Any]) -> None:
    """Write the page and the picture."""
    (out / "shrink-speed.md").write_text(page(record))
    (out / PICTURE).parent.mkdir(exist_ok=True)
    (out / PICTURE).write_text(picture(record))


def setting_of(protocol: Protocol) -> dict[str, Any]:
    """What all perplexities of a model are measured with."""
    return {
        "calibration": name_of(protocol.calibration),
        "evaluation": name_of(protocol.evaluation),
        "samples": protocol.samples,
        "length": LENGTH,
        "windows": protocol.windows,
        "window_length": protocol.window_length,
    }


def of_model(record: dict[str, Any], name: str, setting: dict[str, Any]) -> dict[str, Any]:
    """The results of a model; the first call gives them their setting.

    Raises:
        typer.BadParameter: if earlier results have another setting.
    """
    found: dict[str, Any] = record["models"].setdefault(name, {"setting": setting, **{step: [] for step in STEPS}})
    for key, value in found["setting"].items():
        if setting[key] != value:
            raise typer.BadParameter(
                f"{name} was measured with {key} {value!r}, not {setting[key]!r}: give the same, or remove {name} from "
                "shrink-speed.json"
            )
    return found


class Forms:
    """One model in all its forms.

    Args:
        protocol: the model and the texts.
        folder: holds a folder for each form; they are made if they are missing.
    """

    def __init__(self, protocol: Protocol, folder: Path) -> None:
        self._protocol, self._folder, self._earlier = protocol, folder, Earlier()

    @cached_property
    def _bench(self) -> Workbench:
        """The dense model and the texts."""
        return Workbench(self._protocol)

    def perplexity(self, form: Form) -> dict[str, Any]:
        """Perplexity of a form, and bytes of its weights in files."""
        bench, folder = self._bench, self._made(form)
        model = bench.model if folder is None else load_model(folder, dtype=torch.float32)[0]
        names = () if folder is None else (name for name in files_in(folder) if name.endswith(".safetensors"))
        size = 4 * n_parameters(model) if folder is None else sum((folder / name).stat().st_size for name in names)
        length, windows = self._protocol.window_length, self._protocol.windows
        value = perplexity(model, bench.ids, length=length, windows=windows, beginning=bench.beginning).perplexity
        return {"perplexity": value, "bytes": size, "processor": processor_name()}

    def speed(self, form: Form, rounds: int, new_tokens: int) -> dict[str, Any]:
        """Tokens per CPU second of a form and of the dense model in float32, both in the compiled step, in turn."""
        dense, tokenizer = checkpoint.load(self._protocol.model, dtype=torch.float32)
        folder = self._made(form)
        model = dense if folder is None else load_model(folder, dtype=torch.float32)[0]
        ids = torch.tensor([tokenizer(PROMPT).input_ids], dtype=torch.int64, device="cpu")
        speeds = [[tokens_per_second(side, ids, new_tokens) for side in (dense, model)] for _ in range(rounds + 1)]
        speeds = speeds[1:]  # A first round is not counted.
        return {
            "tokens_per_second": statistics.median(own for _, own in speeds),
            "dense_tokens_per_second": statistics.median(dense for dense, _ in speeds),
            "over_dense": statistics.median(own / dense for dense, own in speeds),
            "rounds": rounds,
            "new_tokens": new_tokens,
            "processor": processor_name(),
        }

    def _made(self, form: Form) -> Path | None:
        """The folder of a form; None for the dense model in float32, which is given."""
        if form == DENSE:
            return None
        folder = self._folder / str(form).replace(":", "-").replace(" ", "-").replace(",", "").replace("%", "")
        if folder.exists():
            return folder
        if form.bits is None:
            self._shrink(form.ratio, folder)
            return folder
        whole = self._made(Form(form.ratio))
        model = copy.deepcopy(self._bench.model) if whole is None else load_model(whole, dtype=torch.float32)[0]
        if form.pattern:
            prune_model(model, self._ids, replaced(BALANCED, {"sparsity": form.pattern}))
            pack_model(model, form.pattern, bits=BITS, group=GROUP, head_bits=BITS, dense_bits=BITS)
        else:
            pack_model(model, group=GROUP, head_bits=BITS, dense_bits=BITS)
        save_packed(model, self._bench.tokenizer, folder)
        return folder

    def _shrink(self, ratio: float, folder: Path) -> None:
        """Write the model without a ratio of its blocks' parameters. All ratios share one ranking."""
        settings = ShrinkSettings(ratio, update="lstsq")
        smaller, _ = Run(self._bench.model, self._ids, settings, earlier=self._earlier).result(dry_run=False)
        assert smaller is not None
        partial = folder.with_suffix(".part")
        smaller.save_pretrained(partial)  # type: ignore[operator]
        self._bench.tokenizer.save_pretrained(partial)
        partial.rename(folder)

    @property
    def _ids(self) -> torch.Tensor:
        return self._bench.calibration(LENGTH, SEED)


class _Clock:
    """A streamer that keeps the CPU time at which the prompt and each new token arrived."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _token: torch.Tensor) -> None:
        self.times.append(time.process_time())

    def end(self) -> None:
        """Nothing to do."""


@torch.inference_mode()
def tokens_per_second(model: Any, ids: torch.Tensor, new_tokens: int) -> float:
    """New tokens after the first one per CPU second, in the compiled step."""
    clock = _Clock()
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    mask = torch.ones_like(ids)
    compiled_generate(model, ids, attention_mask=mask, do_sample=False, streamer=clock, **lengths)
    return (new_tokens - 1) / (clock.times[-1] - clock.times[-new_tokens])


if __name__ == "__main__":
    typer.run(main)
