"""The table and the lines that the commands print say what share of the weights was pruned, skipped and excluded."""

import io

import pytest
from rich.console import Console

from ace_triton import prune_model
from ace_triton.commands.report import prune_table, skipped_lines


@pytest.fixture
def report(make_decoder, ids):
    """Of a model whose down projections do not fit 2:4, with the value projections excluded."""
    return prune_model(make_decoder("llama", intermediate_size=50), ids, "magnitude", exclude="*.v_proj")


def rows_of(table) -> dict[str, str]:
    out = io.StringIO()
    Console(file=out, width=100).print(table)
    cells = (line.strip("│").split("│") for line in out.getvalue().splitlines() if line.startswith("│"))
    return {name.strip(): value.strip() for name, value in cells}


def test_the_table_gives_the_shares_of_all_block_weights(report):
    rows = rows_of(prune_table(report))
    down, values, block = 50 * 32, 16 * 32, 2 * 32 * 32 + 2 * 16 * 32 + 3 * 50 * 32
    assert rows["layers pruned"] == str(3 * 5)
    assert rows["weights kept in them"] == "50.0%"
    assert rows["in pruned layers, of the blocks' weights"] == f"{(block - down - values) / block:.1%}"
    assert rows["skipped (listed below)"] == f"{down / block:.1%}"
    assert rows["excluded by name"] == f"{values / block:.1%}"
    model = 3 * (block + 2 * 32) + 32 + 2 * 101 * 32
    assert rows["outside the blocks, of the model's weights"] == f"{2 * 101 * 32 / model:.1%}"


def test_layers_skipped_for_one_reason_are_one_line(report):
    share = 3 * 50 * 32 / report.account.model
    assert skipped_lines(report.skipped) == [
        f"model.layers.0.mlp.down_proj and 2 more: its 50 inputs are not a multiple of 4 ({share:.1%} of the model's "
        "parameters)"
    ]


def test_what_is_left_out_of_the_lines_is_counted(report):
    assert skipped_lines(report.skipped, most=0) == [f"and 3 more ({3 * 50 * 32 / report.account.model:.1%})"]


def test_the_times_of_a_run_sum_to_its_total(make_decoder, ids):
    options = {"permute": True, "rotate": True, "update": "lstsq", "quantize": 8}
    report = prune_model(make_decoder("llama"), ids, "wanda", **options).with_load(0.5, 0.25)
    rows = rows_of(prune_table(report))
    times = {name: float(time.removesuffix(" s")) for name, time in rows.items() if time.endswith(" s")}
    total = times.pop("total, without reading text and saving")
    assert times.pop("CPU time of the total, all threads") == pytest.approx(report.cpu_seconds, abs=0.01)
    assert report.to_dict()["cpu_seconds"] == report.cpu_seconds > 0.25
    assert sum(times.values()) == pytest.approx(total, abs=0.01 * len(times))
    assert {"rounding", "weight update", "channel order", "everything else"} <= times.keys()
    assert report.seconds.quantize > 0
    assert report.seconds.other < 0.2 * report.seconds.total
