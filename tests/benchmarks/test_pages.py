"""The pages that commands write say what their records say, in the words that the commands have now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ace_triton.study.workbench import Protocol
from benchmarks.harness import results
from benchmarks.harness.traffic_counter import Traffic
from benchmarks.reports import (
    budgets,
    cpu_ratios,
    permutation,
    quantization,
    recovery,
    recovery_short,
    report_bench,
    rotations,
    sparse,
    structured,
    traffic,
    trials_page,
)
from benchmarks.reports.block_traffic import BlockRow

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def record(name: str) -> dict:
    return json.loads((DOCS / f"{name}.json").read_text())


def cpu() -> str:
    return cpu_ratios.markdown(record("cpu"))


def recovery_page() -> str:
    return recovery.page(recovery.measured(DOCS, recovery.TOKENS), recovery.TOKENS, recovery_short.measured(DOCS))


def channel_orders() -> str:
    found = record("permutation")
    return permutation.page(found["method"], [permutation.Row(**row) for row in found["rows"]])


def memory_traffic() -> str:
    def row(found: dict) -> traffic.Row:
        return traffic.Row(found["what"], found["elements"], found["least"], Traffic(**found["traffic"]))

    def layer(found: dict) -> traffic.LayerRow:
        first, further = Traffic(**found["first"]), Traffic(**found["further"])
        return traffic.LayerRow(found["method"], first, further, found["elements"], found["least"])

    def block(found: dict) -> BlockRow:
        counts = (Traffic(**found[name]) for name in ("checks", "together", "alone"))
        return BlockRow(found["method"], *counts)

    found = record("traffic")
    ours, layers, published = map(row, found["ours"]), map(layer, found["layers"]), map(row, found["published"])
    return traffic.page(list(ours), list(layers), list(map(block, found["blocks"])), list(published))


PAGES: dict[str, Callable[[], str]] = {
    "benchmarks": lambda: report_bench.page(results.outcomes(results.load(ROOT / "benchmarks" / "results.csv"))),
    "budgets": lambda: budgets.page(budgets.measured(DOCS), Protocol("smollm2")),
    "cpu": cpu,
    "permutation": channel_orders,
    "quantization": lambda: quantization.page(record("quantization")),
    "recovery": recovery_page,
    "rotations": lambda: rotations.page(record("rotations")),
    "trials": lambda: trials_page.page(record("trials")),
    "sparse": lambda: "\n".join(sparse.page(record("sparse"))) + "\n",
    "structured": lambda: structured.page(structured.read(DOCS)),
    "traffic": memory_traffic,
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_command_writes(name):
    assert (DOCS / f"{name}.md").read_text() == PAGES[name]()


def test_every_trial_of_a_record_is_on_its_page():
    """A trial that is renamed must be renamed in its record too."""
    assert {outcome.trial for outcome in recovery.measured(DOCS, recovery.TOKENS)} <= {"", *recovery.TRIALS}
