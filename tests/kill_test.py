"""Kill pruning, recovery, packing and shrinking at random moments, run them again, and compare the resulting bytes.

    python -m tests.kill_test --kills 100
    python -m tests.kill_test --kills 20 --only shrink

Each job runs in a forked process that is killed after a random time, until it ends by itself; its files must be those
of an undisturbed run. The random numbers are seeded, but the moments depend on the machine's speed. What was compared
is written to docs/kill-test.json, which docs/large-models.md shows.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import torch
import typer

from ace_triton import Recipe, pack_model, prune_checkpoint, recover, save_packed, shrink_checkpoint
from ace_triton.inputs import checkpoint
from ace_triton.provenance import with_provenance
from ace_triton.recovery.settings import RecoverySettings
from ace_triton.recovery.state import remove_state
from benchmarks.harness.results import processor

REPORTS = ("ace_triton.json", "ace_triton_packed.json")
"""Files with times and dates, which no two runs share."""


def main(
    kills: Annotated[int, typer.Option(help="Number of kills, spread over the jobs.")] = 100,
    seed: Annotated[int, typer.Option(help="Random seed of the moments.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Job to run, as shrink; the others' results stay.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file of the results.")] = Path("docs/kill-test.json"),
) -> None:
    """Run all jobs; fail at the first difference."""
    torch.set_num_threads(1)
    draws = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_source(folder / "source")
        jobs = make_jobs(folder, source)
        if unknown := [job for job in only or () if job not in jobs]:
            raise typer.BadParameter(f"--only must be one of {', '.join(jobs)}; got {unknown[0]!r}")
        found = json.loads(out.read_text())["jobs"] if only and out.exists() else {}
        jobs["prune"](folder / "prune")  # Others read its result.
        chosen = {job: run for job, run in jobs.items() if job in (only or jobs)}
        for number, (job, run) in enumerate(chosen.items()):
            if job != "prune":
                run(folder / job)
            seconds = undisturbed_seconds(folder, job, run)
            share = kills // len(chosen) + (number < kills % len(chosen))
            results = killed_and_repeated(folder, job, run, share, seconds, draws)
            print(f"{job}: {share} kills, {results} results, all with the same bytes", flush=True)
            found[job] = {"kills": share, "results": results, "seconds": round(seconds, 2)}
    out.write_text(json.dumps(with_provenance({"seed": seed, "jobs": found}, processor=processor()), indent=2) + "\n")


def make_source(folder: Path) -> Path:
    """A small random Llama with six blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, num_hidden_layers=6, **sizes)).save_pretrained(folder)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {chr(33 + index): index for index in range(94)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, []))).save_pretrained(folder)
    return folder


def make_jobs(folder: Path, source: Path) -> dict[str, Callable[[Path], None]]:
    """What is killed, by name; each writes the folder that it is given. Later jobs use the results of earlier ones."""
    ids = torch.randint(0, 320, (8, 32), generator=torch.Generator().manual_seed(0))

    def prune(out: Path) -> None:
        prune_checkpoint(source, out, ids, Recipe("wanda", permute=True, update="lstsq"), batch_size=2)

    def prune_packed(out: Path) -> None:
        prune_checkpoint(source, out, ids, Recipe("wanda", update="lstsq"), batch_size=2, packed=True)

    def train(out: Path) -> None:
        model, tokenizer = checkpoint.load(folder / "prune")
        teacher, _ = checkpoint.load(source)
        state = folder / f"{out.name}.state"
        recover(model, teacher, ids, RecoverySettings(steps=8, tokens_per_step=64), state=state, save_every=0.0)
        checkpoint.save(model, tokenizer, out, {})
        remove_state(state)

    def pack(out: Path) -> None:
        model, tokenizer = checkpoint.load(folder / "prune")
        pack_model(model)
        save_packed(model, tokenizer, out, report={})

    def shrink(out: Path) -> None:
        shrink_checkpoint(source, out, ids, multiple=16)

    return {"prune": prune, "prune --packed": prune_packed, "recover": train, "pack": pack, "shrink": shrink}


def undisturbed_seconds(folder: Path, job: str, run: Callable[[Path], None]) -> float:
    """Wall-clock time of a forked process that is not killed; its files are compared, too."""
    started = time.perf_counter()
    killed_and_repeated(folder, job, run, 0, 0.0, random.Random())
    return time.perf_counter() - started


def killed_and_repeated(
    folder: Path, job: str, run: Callable[[Path], None], kills: int, seconds: float, draws: random.Random
) -> int:
    """Kill a job this many times; returns how many results were compared."""
    done = results = 0
    for attempt in itertools.count():
        out = folder / f"{job}-again"
        child = os.fork()
        if not child:
            _run_and_exit(run, out)
        if done < kills:
            time.sleep(draws.uniform(0, 1.2 * seconds))
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        done += code == -signal.SIGKILL
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{job}: attempt {attempt} ended with {code}")
        if code == 0:
            compare(folder / job, out)
            shutil.rmtree(out)
            results += 1
            if done >= kills:
                return results
    raise AssertionError


def _run_and_exit(run: Callable[[Path], None], out: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What an earlier, killed run has left is removed with a warning.
            if not out.exists():  # A run that was killed after its last step needs no other.
                run(out)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def compare(expected: Path, found: Path) -> None:
    """RuntimeError unless two folders have the same files, except for reports."""
    names = [sorted(path.name for path in folder.iterdir()) for folder in (expected, found)]
    if names[0] != names[1]:
        raise RuntimeError(f"{found} has {names[1]}, {expected} has {names[0]}")
    for name in names[0]:
        if name not in REPORTS and (expected / name).read_bytes() != (found / name).read_bytes():
            raise RuntimeError(f"{found / name} differs from that of an undisturbed run")


if __name__ == "__main__":
    typer.run(main)
