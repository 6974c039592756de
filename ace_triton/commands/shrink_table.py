"""The table that ``ace-triton shrink`` prints."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from ..available_memory import available_memory
from ..byte_sizes import shown_bytes
from ..evaluate import Perplexity
from ..structures.report import ShrinkReport
from .report import facts_table

_WIDTHS = {
    "channels": "feed-forward width",
    "groups": "key-value groups in a block",
    "experts": "experts in a mixture",
    "expert_channels": "width of an expert",
    "blocks": "blocks",
}


def shrink_table(report: ShrinkReport, measured: Mapping[str, Perplexity]) -> Table:
    """What was removed, what it did to the perplexity, and how long each stage took.

    Args:
        report: the report of the run.
        measured: the perplexity "before" and "after", if it was measured.
    """
    settings = report.settings
    table = facts_table(", ".join([settings.method, *([settings.chosen_update] * (settings.chosen_update != "none"))]))
    for kind, (before, after) in report.widths.items():
        mean = ", mean" * (kind == "channels" and settings.widths == "uneven")
        table.add_row(_WIDTHS[kind] + mean, f"{before:,} -> {after:,}" if after != before else f"{before:,}, all kept")
    if report.removed_blocks:
        table.add_row("removed blocks", ", ".join(map(str, report.removed_blocks)))
    table.add_row("parameters of the blocks", f"{report.blocks_before:,} -> {report.blocks_after:,}")
    asked = f"{settings.ratio:.1%}" if settings.size is None else f"at most {shown_bytes(settings.size)}"
    asked = asked if settings.speedup is None else f"a block {settings.speedup:g} times as fast"
    table.add_row("removed, of the blocks' parameters", f"{report.removed:.1%} (asked for {asked})")
    table.add_row("parameters of the model", f"{report.model_before:,} -> {report.model_after:,}")
    table.add_row("removed, of the model's parameters", f"{1 - report.model_after / report.model_before:.1%}")
    table.add_row("size of the checkpoint", f"{shown_bytes(report.bytes_before)} -> {shown_bytes(report.bytes_after)}")
    if (estimate := report.estimate) is not None:
        most = f"{shown_bytes(estimate.peak_bytes)} at most (to {estimate.largest_phase})"
        table.add_row("memory of the tensors, estimated", most)
        table.add_row("memory available, with the model loaded", shown_bytes(available_memory()))
        table.add_row("time, estimated", f"{estimate.seconds:.0f} s without loading and saving")
    for groups, loss in report.tried.items():
        table.add_row(
            f"loss with {groups} key-value group{'s' * (groups != 1)} removed",
            f"{loss:.4f} nats per token, before the update",
        )
    if report.output_error is not None:
        before_update, after_update = report.output_error
        table.add_row("mean error of layer outputs, before the update", f"{before_update:.1%}")
        table.add_row("mean error of layer outputs, after the update", f"{after_update:.1%}")
    for which, found in measured.items():
        table.add_row(f"perplexity {which}", f"{found.perplexity:.2f}")
    for name, value in report.config.items():
        shown = f"a list of {len(value)}" if isinstance(value, list) else str(value)
        shown = f"shapes of {len(value)} weights" if isinstance(value, dict) else shown
        table.add_row(f"config.json: {name}", shown)
    for name, seconds in report.seconds.items():
        table.add_row(f"seconds: {name}", f"{seconds:.1f}")
    return table
