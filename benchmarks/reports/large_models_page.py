"""The page docs/large-models.md, from the records of large_models and of the kill test."""

from __future__ import annotations

import os
import statistics
from typing import Any


def page(found: dict[str, Any], kills: dict[str, Any] | None) -> str:
    """The page of the results.

    Args:
        found: the content of large-models.json.
        kills: the content of kill-test.json, if it exists.
    """
    lines = [
        "# Large models",
        "",
        "Made by `make large-models`; how it works is in the [guide](guides/very-large-models.md). Measured on a CPU,",
        "one thread a process. Peak memory is the resident memory of the process, with all that Python and torch need.",
    ]
    if "depth" in found:
        lines += [
            "",
            "## Memory does not grow with depth",
            "",
            "`prune_checkpoint` with the recipe `fast` on random weights of Llama's shape, width 4,096, bf16.",
            "",
            "| blocks | model | one block | peak memory |",
            "|---:|---:|---:|---:|",
            *(
                f"| {row['blocks']} | {gb(row['bytes'])} | {gb(row['block_bytes'])} | {gb(row['peak_bytes'])} |"
                for row in found["depth"]
            ),
        ]
    if "time" in found:
        of = found["time"]
        peaks = {how: statistics.median(run["peak_bytes"] for run in of[how]) for how in ("in_memory", "streamed")}
        same = "The weight files are equal byte for byte." if of["same_bytes"] else "The weight files DIFFER."
        lines += [
            "",
            "## Time beside pruning in memory",
            "",
            f"`ace-triton prune` with its default recipe on {of['model']}, in turns: streamed takes",
            f"{of['cpu_time_ratio']:.2f} times the CPU time (median of {len(of['streamed'])} pairs).",
            f"Peak memory: {gb(peaks['streamed'])} streamed, {gb(peaks['in_memory'])} in memory. {same}",
        ]
    if "processes" in found:
        rows = found["processes"]
        same = "All files are equal byte for byte." if len({row["sha256"] for row in rows}) == 1 else "Files DIFFER."
        lines += [
            "",
            "## Several processes",
            "",
            f"The same command under torchrun, on {os.cpu_count()} cores. {same}",
            "",
            "| processes | calibration forwards | whole run |",
            "|---:|---:|---:|",
            *(f"| {r['processes']} | {r['calibration_seconds']:.1f} s | {r['seconds']:.1f} s |" for r in rows),
        ]
    if "plan" in found:
        rows = found["plan"]
        worst = max(max(r["planned_bytes"] / r["peak_bytes"], r["peak_bytes"] / r["planned_bytes"]) for r in rows)
        lines += [
            "",
            "## The plan beside the run",
            "",
            "`ace-triton prune` with its default recipe on 8 sequences of 128 tokens, two blocks pruned; then",
            "`ace-triton evaluate --stream` of the result on a window of 2,048 tokens. Planned is what",
            "`ace-triton plan` says, with file pages. The two peaks differ by a factor of at most",
            f"{worst:.2f}. Measured on {rows[0]['processor']}.",
            "",
            "| model | dtype | weights | planned | pruned with | evaluated with |",
            "|---|---|---|---:|---:|---:|",
            *(
                f"| {r['model']} | {r['dtype']} | {'in files' if r['streamed'] else 'in memory'} | "
                f"" + " | ".join(gb(r[key]) for key in ("planned_bytes", "peak_bytes", "evaluate_bytes")) + " |"
                for r in rows
            ),
        ]
    if "whole" in found:
        lines += whole_model(found["whole"], found.get("perplexity", {}))
    if "shrink" in found:
        lines += smaller_model(found["shrink"])
    if kills is not None:
        lines += [
            "",
            "## Killed at random moments",
            "",
            "`make kill-test` kills each kind of work (SIGKILL) on a small model and repeats it until it ends. Its",
            "files are compared with those of a run that was not killed. At a difference the test fails.",
            "",
            *killed(kills),
        ]
    return "\n".join(lines) + "\n"


def killed(kills: dict[str, Any]) -> list[str]:
    """The table of the kill test.

    Args:
        kills: the content of kill-test.json.
    """
    return [
        "| work | kills | results, all with the same bytes |",
        "|---|---:|---:|",
        *(f"| {job} | {row['kills']} | {row['results']} |" for job, row in kills["jobs"].items()),
    ]


def whole_model(pruning: dict[str, Any], perplexity: dict[str, Any]) -> list[str]:
    """The section on a model that was pruned and evaluated in files."""
    rows = [("prune", pruning)]
    rows += [(f"evaluate the {name} model", perplexity[name]) for name in ("pruned", "dense") if name in perplexity]
    lines = [
        "",
        "## A whole model in files",
        "",
        f"`ace-triton prune --stream` of all blocks of {pruning['model']} with its default recipe",
        f"({pruning['recipe']}, permuted), on {pruning['sequences']} sequences of {pruning['length']} tokens.",
        f"The weights take {gb(pruning['bytes'])} in {pruning['dtype']}. Measured on {pruning['processor']}.",
    ]
    if perplexity:
        lines += [
            f"`ace-triton evaluate --stream` ran on the first {perplexity['windows'] * 2048:,} tokens of",
            f"`{perplexity['text']}`, in windows of 2,048.",
        ]
    return [
        *lines,
        "",
        "| work | peak memory | perplexity |",
        "|---|---:|---:|",
        *(
            f"| {work} | {gb(row['peak_bytes'])} | {format(row['perplexity'], '.2f') if 'perplexity' in row else ''} |"
            for work, row in rows
        ),
    ]


def smaller_model(run: dict[str, Any]) -> list[str]:
    """The section on a smaller dense model that was made in files."""
    same = {None: "", True: " The weight files are equal byte for byte.", False: " The weight files DIFFER."}
    return [
        "",
        "## A smaller dense model in files",
        "",
        f"`ace-triton shrink {run['options']}` of {run['model']} with its default method.",
        f"The checkpoint goes from {gb(run['dense_bytes'])} to {gb(run['bytes'])}.{same[run.get('same_bytes')]}",
        f"Measured on {run['processor']}.",
        "",
        "| weights | peak memory | CPU time |",
        "|---|---:|---:|",
        *(
            f"| {name} | {gb(run[how]['peak_bytes'])} | {run[how]['cpu_seconds']:.0f} s |"
            for name, how in (("in files (`--stream`)", "streamed"), ("in memory", "in_memory"))
            if how in run
        ),
    ]


def gb(size: float | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f} GB"
