"""The record of CPU times keeps every machine's results."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.reports.cpu_ratios import Ratio, add_machine, markdown

FACTS = {
    "processor": "first",
    "instruction set": "avx2",
    "threads": "1",
    "torch": "2.13.0",
    "python": "3.11",
    "weight": "4096 x 11008",
}
RATIO = Ratio("2:4 in place", "a read", "fp32", 2.0, 1.0, 2.0, "<= 1.6", False)


def test_a_run_replaces_the_results_of_its_own_machine_only():
    record = {"machines": []}
    add_machine(record, FACTS, [RATIO])
    add_machine(record, {**FACTS, "processor": "second"}, [RATIO])
    add_machine(record, {**FACTS, "instruction set": "avx512"}, [RATIO])
    add_machine(record, {**FACTS, "python": "3.12"}, [replace(RATIO, ratio=1.5, met=True)])

    found = [(machine["environment"]["processor"], machine["ratios"][0]["ratio"]) for machine in record["machines"]]
    assert found == [("first", 1.5), ("second", 2.0), ("first", 2.0)]
    assert record["machines"][0]["environment"]["python"] == "3.12"


def test_the_page_has_a_table_for_each_machine():
    record = {"machines": []}
    add_machine(record, FACTS, [RATIO])
    add_machine(record, {**FACTS, "processor": "second", "threads": "2"}, [replace(RATIO, ratio=1.5, met=True)])

    page = markdown(record)
    first, second = page.split("## ")[1:]
    assert first.startswith("first, avx2")
    assert second.startswith("second, avx2")
    assert "1 thread," in first
    assert "0 of this project's 1 targets for these times are met." in first
    assert "2.00x | <= 1.6 (missed) |" in first
    assert "2 threads," in second
    assert "1 of this project's 1 targets for these times are met." in second
    assert "1.50x | <= 1.6 |" in second
