"""``ace-triton methods``."""

from __future__ import annotations

from ..methods.registry import metric, metric_names
from ..solvers.update import Update
from . import report
from .console import console
from .options import PluginOption


def methods(plugin: PluginOption = None) -> None:
    """List the pruning methods and weight updates, with the default and the allowed values of each option."""
    table = report.headed_table(
        "method", "option", "default", "allowed", left=("method", "option", "default", "allowed")
    )
    for name in metric_names():
        options = list(metric(name).types.values())
        if not options:
            table.add_row(name, "", "", "")
        for place, option in enumerate(options):
            table.add_row("" if place else name, option.name, str(option.default), option.allowed)
    for place, option in enumerate(Update.types().values()):
        table.add_row("" if place else "--update lstsq", option.name, str(option.default), option.allowed)
    table.add_row("--update rescale", "", "", "")
    console.print(table)
