"""What ``ace-triton plan`` and ``ace-triton prune --dry-run`` do: read the options of ``prune`` and show the plan."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.table import Table

from ..byte_sizes import shown_bytes
from ..planning.memory import Memory
from ..planning.pruning_plan import PruningPlan
from ..provenance import with_provenance
from . import report
from .console import console, print_line, print_note, print_warning
from .options import check_json, parse_device
from .prune_run import PruneRun
from .recipe_file import SavedRun
from .recipe_flags import calibration_from, check_places, given_flags, recipe_from, replaced_lines, stored_from


def run_from(context: typer.Context) -> tuple[PruneRun, SavedRun | None]:
    """The run that the options of ``prune`` ask for, and the content of the file of ``--recipe``.

    Raises:
        ValueError: if an option is invalid, or the model cannot be pruned so; nothing is loaded.
    """
    given, values = given_flags(context), context.params
    path = None if values["recipe"] is None else Path(values["recipe"])
    saved = None if path is None else SavedRun.read(path)
    settings, dtype = calibration_from(given, None if saved is None else saved.calibration), values["dtype"]
    recipe = recipe_from(given, saved)
    stored = stored_from(given, None if saved is None else saved.stored, recipe.quantize)
    run = PruneRun(
        values["src"],
        Path(values["out"] or ""),
        recipe,
        settings,
        dtype=dtype if "dtype" in given or saved is None else saved.dtype or dtype,
        device=values["device"],
        packed=bool(values["packed"] or (stored is not None and values["packed"] is None)),
        stored=stored,
        trust_remote_code=values["trust_remote_code"],
        overwrite=values["overwrite"],
        stream=values["stream"],
        restart=values["restart"],
        offload=values["offload"],
        task_name=values["task"] if "task" in given or saved is None else saved.task,
    )
    run.check_recipe()
    check_json(None if values["json"] is None else Path(values["json"]))
    if path is not None and run.recipe.calibrated:
        check_places(settings, path)
    return run, saved


def show_plan(context: typer.Context) -> None:
    """Print the plan of the run that the options of ``prune`` ask for, and write its JSON file."""
    run, saved = run_from(context)
    values, settings = context.params, run.calibration
    if saved is not None:
        for line in replaced_lines(Path(values["recipe"]), saved, run, settings):
            print_note(line)
    plan = run.plan(
        out=run.out if values["out"] else None,
        device=parse_device(run.device),
        overwrite=run.overwrite,
        stream=run.stream,
        probe=values.get("probe", False),
    )
    if values["json"]:
        report.write_json(values["json"], with_provenance(plan.to_dict(), calibration=settings.to_dict()))
    console.print(plan_table(plan, probes=run.of_text_alone, packed=run.packed))
    for line in report.skipped_lines(plan.skipped):
        print_line(f"stays dense: {line}")
    for line in plan.unchecked:
        print_line(f"not checked: {line}")
    for line in plan.warnings:
        print_warning(line)


def plan_table(plan: PruningPlan, *, probes: bool = True, packed: bool = False) -> Table:
    """What a run would prune, and what it would take; sizes and times are estimates.

    Args:
        plan: the plan.
        probes: True if ``--probe`` can estimate the time.
        packed: True if the output is packed.
    """
    table = report.facts_table(f"{plan.recipe.words}, {plan.recipe.sparsity}")
    account = plan.account
    table.add_row("layers to prune", f"{len(plan.layers)}, in {plan.blocks} blocks")
    if len(plan.towers) > 1:
        for name, blocks in plan.towers.items():
            table.add_row(f"tower {name}", f"{blocks} blocks")
    table.add_row("in pruned layers, of the blocks' weights", f"{account.share('pruned'):.1%}")
    table.add_row("skipped (listed below)", f"{account.share('skipped'):.1%}")
    table.add_row("excluded by name", f"{account.share('excluded'):.1%}")
    table.add_row("outside the blocks, of the model's weights", f"{account.outside / account.model:.1%}")
    table.add_row("type of the weights", plan.dtype)
    table.add_row("memory with the model in memory", _memory(plan.in_memory))
    table.add_row("memory if streamed", _memory(plan.streamed))
    table.add_row("memory of a GPU, if it runs there", _memory(plan.device))
    table.add_row("memory available", shown_bytes(plan.available_bytes))
    table.add_row("where the weights would be", "in files (--stream)" if plan.streams else "in memory")
    table.add_row("size of the output", shown_bytes(plan.disk.output_bytes))
    if packed:
        table.add_row("memory of its weights when it is loaded", shown_bytes(plan.disk.weight_bytes))
    table.add_row("disk while it runs", shown_bytes(plan.disk.work_bytes))
    if plan.disk.free_bytes is not None:
        table.add_row("disk free", shown_bytes(plan.disk.free_bytes))
    if plan.time is None:
        table.add_row("time", "not estimated" + " (plan --probe)" * probes)
    else:
        weights = "their own weights" if plan.time.real_weights else "random weights"
        table.add_row("time to prune, estimated", f"{_duration(plan.time.seconds)}")
        table.add_row("estimated from", f"{len(plan.time.blocks)} blocks with {weights}")
    return table


def _memory(need: Memory) -> str:
    pages = need.peak_resident - need.peak
    dropped = f", and up to {shown_bytes(pages)} of file pages" if pages > 0.01 * need.peak else ""
    return f"{shown_bytes(need.peak)} (to {need.largest_phase}{dropped})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
