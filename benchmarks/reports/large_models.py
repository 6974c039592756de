"""Memory and time of pruning in files, and of several processes; writes docs/large-models.{json,md}.

    python -m benchmarks.reports.large_models --model smollm2 --larger qwen --calibration c4.jsonl.gz

Every run is a process of its own. A made checkpoint of random weights (Llama's shape, 8 GB with 20 blocks) shows how
memory depends on depth; it needs free disk for two copies. Results in the JSON file are kept, so one part can be
measured again: ``--only depth``. ``--larger`` is a folder of a model with a large vocabulary, for the parts ``plan``,
``whole`` (prune all of it), ``perplexity`` (evaluate what was pruned) and ``shrink`` (make it smaller). ``--pruned``
names a folder in which the pruned model stays, so that these two can run one after the other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.harness.results import processor
from benchmarks.reports.large_models_page import page

DEPTHS = (10, 20)
WIDTH, VOCABULARY = 4096, 49_152
SEQUENCES, LENGTH = 4, 16
ROUNDS = 3
INCLUDED = ("*.layers.[01].*",)
SMALL = ("--samples", "8", "--length", "128", "--batch-size", "4")
USUAL = ("--samples", "32", "--length", "128", "--batch-size", "4", "--dtype", "float32")
SHRINK = ("--ratio", "0.2", "--samples", "8", "--length", "128", "--dtype", "float32")
FILE_BYTES = 500e6

STREAMED = """
import sys, torch
from ace_triton import prune_checkpoint
ids = torch.randint(0, 1000, ({sequences}, {length}), generator=torch.Generator().manual_seed(0))
prune_checkpoint(sys.argv[1], sys.argv[2], ids, "fast")
"""

console = Console()


def main(
    model: Annotated[str, typer.Option(help="A real model for the time beside pruning in memory.")] = "smollm2",
    calibration: Annotated[str, typer.Option()] = "pydoc:calibration",
    out: Annotated[Path, typer.Option(help="Folder of large-models.json and large-models.md.")] = Path("docs"),
    evaluation: Annotated[str, typer.Option()] = "pydoc:evaluation",
    wikitext: Annotated[bool, typer.Option("--wikitext", help="The evaluation text is a raw WikiText file.")] = False,
    larger: Annotated[
        Path | None, typer.Option(help="A second, larger model: plan, whole, perplexity, shrink.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="One part: depth, time, processes, plan, whole, perplexity, shrink; or the page.")
    ] = None,
    pruned: Annotated[
        Path | None, typer.Option(help="Folder for the pruned model of the part whole, for the part perplexity.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Number of windows for the part perplexity.")] = 4,
    scratch: Annotated[Path | None, typer.Option(help="Folder for the checkpoints, with 20 GB free.")] = None,
) -> None:
    """Measure what is asked for, and write the page."""
    record = out / "large-models.json"
    found: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    text = (evaluation, *(["--wikitext"] if wikitext else []))
    large = model if larger is None else str(larger)

    def keep(name: str, result: Any) -> None:
        found[name] = result
        others = json.loads(record.read_text()) if record.exists() else {}
        record.write_text(json.dumps({**others, name: result}, indent=2) + "\n")

    parts: dict[str, Callable[[Path], Any]] = {
        "depth": depth,
        "time": lambda folder: beside_memory(folder, model, calibration),
        "processes": lambda folder: by_processes(folder, model, calibration),
        "plan": lambda folder: beside_plan(
            folder,
            [model, *([] if larger is None else [str(larger)])],
            calibration,
            text,
            found.get("plan", []),
            keep,
        ),
        "whole": lambda folder: whole(pruned or folder / "pruned", large, calibration),
        "perplexity": lambda folder: perplexity(pruned or folder / "pruned", large, text, windows, keep),
        "shrink": lambda folder: shrunk(folder, large, calibration, keep),
    }
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for name, measure in parts.items():
            if only in (None, name):
                keep(name, measure(Path(folder)))
                console.print(name, found[name], highlight=False)
    kills = out / "kill-test.json"
    found = json.loads(record.read_text())
    (out / "large-models.md").write_text(page(found, json.loads(kills.read_text()) if kills.exists() else None))


def depth(folder: Path) -> list[dict[str, Any]]:
    """Peak memory of a streamed run, for two depths of the same blocks."""
    rows = []
    for layers in DEPTHS:
        source = folder / f"{layers}"
        size, block = make_checkpoint(source, layers)
        code = STREAMED.format(sequences=SEQUENCES, length=LENGTH)
        run = measured([sys.executable, "-c", code, str(source), str(folder / "out")])
        rows.append({"blocks": layers, "bytes": size, "block_bytes": block, **run})
        shutil.rmtree(source)
        shutil.rmtree(folder / "out")
    return rows


def make_checkpoint(folder: Path, layers: int) -> tuple[int, int]:
    """Write a checkpoint of random bf16 weights; returns the bytes of the model and of a block."""
    from accelerate import init_empty_weights
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from ace_triton.inputs.checkpoint import smollm2_file

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=11_264,
        num_hidden_layers=layers,
        num_attention_heads=WIDTH // 128,
        num_key_value_heads=WIDTH // 512,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir()
    config.save_pretrained(folder)
    tokens = smollm2_file()
    AutoTokenizer.from_pretrained(tokens.parent, gguf_file=tokens.name).save_pretrained(folder)
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    file: dict[str, torch.Tensor] = {}
    known: dict[torch.Size, torch.Tensor] = {}
    parameters = list(model.named_parameters())
    for index, (name, parameter) in enumerate(parameters):
        if parameter.shape not in known:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            known[parameter.shape] = (values * 0.02 if parameter.dim() > 1 else torch.ones_like(values)).bfloat16()
        file[name] = known[parameter.shape].clone()
        if sum(tensor.nbytes for tensor in file.values()) > FILE_BYTES or index + 1 == len(parameters):
            path = f"model-{len(set(places.values())):05d}.safetensors"
            save_file(file, folder / path, metadata={"format": "pt"})
            places |= dict.fromkeys(file, path)
            file = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    size = 2 * sum(parameter.numel() for _, parameter in parameters)
    return size, 2 * sum(p.numel() for name, p in parameters if name.startswith("model.layers.0."))


def beside_memory(folder: Path, model: str, calibration: str) -> dict[str, Any]:
    """CPU time and peak memory of the default recipe, streamed and in memory, in turns; and whether files are equal."""
    runs: dict[str, list[dict[str, Any]]] = {"--no-stream": [], "--stream": []}
    digests: dict[str, str] = {}
    for _ in range(ROUNDS):
        for how, results in runs.items():
            target = folder / how.strip("-")
            results.append(measured(prune_words(model, target, calibration, how)))
            digests[how] = digest(target)
            shutil.rmtree(target)
    ratios = [s["cpu_seconds"] / m["cpu_seconds"] for m, s in zip(runs["--no-stream"], runs["--stream"], strict=True)]
    return {
        "model": Path(model).name,
        "streamed": runs["--stream"],
        "in_memory": runs["--no-stream"],
        "cpu_time_ratio": statistics.median(ratios),
        "same_bytes": len(set(digests.values())) == 1,
    }


def by_processes(folder: Path, model: str, calibration: str) -> list[dict[str, Any]]:
    """Wall-clock time of the calibration forwards with 1, 2 and 4 processes of one thread; and whether files are equal.

    The machine must have a core for each process; figures with more processes than cores only show the bytes.
    """
    rows = []
    for size in (1, 2, 4):
        target = folder / f"{size}"
        words = prune_words(model, target, calibration, "--no-stream")
        if size > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
            words = [*launcher, *words[1:]]
        run = measured(words)
        report = json.loads((target / "ace_triton.json").read_text())
        rows.append(
            {
                "processes": size,
                "calibration_seconds": report["seconds"]["calibration"],
                "sha256": digest(target),
                **run,
            }
        )
        shutil.rmtree(target)
    return rows


def beside_plan(
    folder: Path,
    models: list[str],
    calibration: str,
    text: tuple[str, ...],
    known: list[dict[str, Any]],
    keep: Callable[[str, Any], None],
) -> list[dict[str, Any]]:
    """Peak memory of pruning in both dtypes beside what ``ace-triton plan`` says, and of evaluating what was pruned.

    Args:
        folder: folder for the checkpoints.
        models: the models.
        calibration: the calibration text.
        text: the evaluation text, and options that say how to read it.
        known: rows that were measured earlier; those of the same cases are replaced.
        keep: saves the rows so far.
    """
    rows = list(known)
    for source, dtype, how in itertools.product(models, ("float32", "bfloat16"), ("--stream", "--no-stream")):
        target, told = folder / "out", folder / "plan.json"
        options = [how, "--dtype", dtype, "--calibration", calibration, "--include", *INCLUDED, *SMALL]
        command = [sys.executable, "-m", "ace_triton"]
        subprocess.run([*command, "plan", source, *options, "--json", str(told)], capture_output=True, check=True)
        memory = json.loads(told.read_text())["memory"]["streamed" if how == "--stream" else "in_memory"]
        pruned = measured([*command, "prune", source, str(target), *options])
        words = [*command, "evaluate", str(target), how, "--text", *text, "--windows", "1"]
        evaluated = measured(words)["peak_bytes"] if how == "--stream" else None
        shutil.rmtree(target)
        row = {"model": Path(source).name, "dtype": dtype, "streamed": how == "--stream", "processor": processor()}
        row |= {"planned_bytes": memory["peak_resident_bytes"], "peak_bytes": pruned["peak_bytes"]}
        case = ("model", "dtype", "streamed")
        rows = [other for other in rows if any(other[key] != row[key] for key in case)]
        rows.append({**row, "evaluate_bytes": evaluated})
        rows.sort(key=lambda row: tuple(map(str, (row[key] for key in case))), reverse=True)
        keep("plan", rows)
        console.print(row, highlight=False)
    return rows


def whole(pruned: Path, model: str, calibration: str) -> dict[str, Any]:
    """Prune a whole model in files, unless an earlier run has done so: time, peak memory and size."""
    run = {} if pruned.exists() else measured(prune_words(model, pruned, calibration, "--stream"))
    report = json.loads((pruned / "ace_triton.json").read_text())
    return {
        "model": Path(model).name,
        "recipe": f"{report['method']} {report['sparsity']}, update {report['update']['kind']}",
        "dtype": report["dtype"],
        "bytes": sum(path.stat().st_size for path in pruned.glob("*.safetensors")),
        "sequences": report["calibration"]["samples"],
        "length": report["calibration"]["length"],
        "processor": processor(),
        "seconds": report["seconds"]["total"],
        "peak_bytes": max(report["peak_bytes"], run.get("peak_bytes", 0)),
    }


def perplexity(
    pruned: Path, model: str, text: tuple[str, ...], windows: int, keep: Callable[[str, Any], None]
) -> dict[str, Any]:
    """Evaluate the dense model and the pruned one in files: time, peak memory and perplexity."""
    found: dict[str, Any] = {"text": Path(text[0]).name, "windows": windows, "processor": processor()}
    for name, of in (("dense", model), ("pruned", str(pruned))):
        with tempfile.NamedTemporaryFile(suffix=".json") as told:
            words = ["evaluate", of, "--stream", "--dtype", "float32", "--text", *text, "--windows", str(windows)]
            run = measured([sys.executable, "-m", "ace_triton", *words, "--json", told.name])
            found[name] = {**run, "perplexity": json.loads(Path(told.name).read_text())["perplexity"]}
        keep("perplexity", dict(found))
    return found


def shrunk(folder: Path, model: str, calibration: str, keep: Callable[[str, Any], None]) -> dict[str, Any]:
    """Make a smaller dense model in files and in memory: CPU time and peak memory; and whether the files are equal.

    Args:
        folder: folder for the checkpoints.
        model: the model.
        calibration: the calibration text.
        keep: saves the results so far.
    """
    found: dict[str, Any] = {"model": Path(model).name, "options": " ".join(SHRINK), "processor": processor()}
    digests = set()
    for name, how in (("streamed", "--stream"), ("in_memory", "--no-stream")):
        target = folder / name
        words = ["-m", "ace_triton", "shrink", model, str(target), how, "--calibration", calibration, *SHRINK]
        found[name] = measured([sys.executable, *words])
        report = json.loads((target / "ace_triton.json").read_text())["shrink"]
        found |= {"dense_bytes": report["bytes_before"], "bytes": report["bytes_after"]}
        digests.add(digest(target))
        shutil.rmtree(target)
        keep("shrink", dict(found))
    return {**found, "same_bytes": len(digests) == 1}


def prune_words(model: str, out: Path, calibration: str, how: str) -> list[str]:
    words = ["-m", "ace_triton", "prune", model, str(out), how, "--calibration", calibration]
    return [sys.executable, *words, *USUAL]


def measured(words: list[str]) -> dict[str, Any]:
    """Run a command on one thread a process: wall-clock time, CPU time, and the peak memory of its largest process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    watched = [sys.executable, "-m", "benchmarks.reports.large_models", "--watch", *words]
    ended = subprocess.run(
        watched, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_bytes": int(ended.stdout.strip().rpartition("\n")[2]),
    }


def watch(words: list[str]) -> None:
    """Run a command and print the peak memory of its largest process: a fresh parent has no other children."""
    ended = subprocess.run(words, stdout=subprocess.DEVNULL, check=False)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
    sys.exit(ended.returncode)


def digest(folder: Path) -> str:
    """SHA-256 of all weight files of a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        watch(sys.argv[2:])
    typer.run(main)
