"""The benchmarks compare only what agrees and is tested, and keep what they measured."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ace_triton.kernels.select_nm import select_nm, select_nm_reference
from benchmarks.harness.agreement import Disagreement, check_nearly_same, check_same_choice
from benchmarks.harness.gate import ReadReport, RunTests, verdict_of
from benchmarks.harness.layer_shapes import LAYERS, distinct, labels_of
from benchmarks.harness.matrices import Matrix, check_sample
from benchmarks.harness.results import COLUMNS, Result, Setting, append, load, outcomes
from benchmarks.reports.report_bench import duration, page, plot

ROOT = Path(__file__).resolve().parents[2]


def mask_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def setting(date: str = "2026-01-01T00:00:00+00:00", evidence: str = "CPU time, measured") -> Setting:
    return Setting("a processor", 1, evidence, "2.13.0", "3.7.1", "0.1.0", date)


def result(provider: str = "ace_triton", seconds: float = 1e-3, tests: str = "passed", **changes) -> Result:
    times = [seconds, 2 * seconds, 3 * seconds]
    made = Result.of("prune 2:4, wanda", provider, (576, 576), torch.bfloat16, times, 1000, tests, setting())
    return replace(made, **{"p20": round(made.p20, 6), "p80": round(made.p80, 6), **changes})


class TestAgreement:
    scores = torch.tensor([[4.0, 3, 2, 1, 5, 5, 5, 1]])

    def test_ties_may_fall_either_way(self):
        check_same_choice(self.scores, mask_of("xx..xx.."), mask_of("xx...xx."), 4)

    def test_scores_a_rounding_apart_are_a_tie(self):
        scores = torch.tensor([[1.0, 1.0 + 1e-6, 0.5, 2.0]])
        check_same_choice(scores, mask_of("x..x"), mask_of(".x.x"), 4)

    def test_zeros_count_for_nothing(self):
        check_same_choice(torch.tensor([[0.0, 0, 3, 1]]), mask_of("..xx"), mask_of("x.xx"), 4)

    @pytest.mark.parametrize("theirs", ["x.x.xx..", "xxx.xx..", "x...xx.."])
    def test_other_choices_are_found(self, theirs):
        with pytest.raises(Disagreement, match="1 of 2 groups of 4"):
            check_same_choice(self.scores, mask_of("xx..xx.."), mask_of(theirs), 4)

    def test_other_shapes_are_refused(self):
        with pytest.raises(Disagreement, match="shapes"):
            check_same_choice(self.scores, mask_of("xx.."), mask_of("xx.."), 4)

    def test_updated_weights_may_differ_a_little(self):
        torch.manual_seed(0)
        ours = torch.randn(100, 100)
        theirs = ours.clone()
        theirs[0, :5] = 0
        check_nearly_same(ours, theirs)
        with pytest.raises(Disagreement, match=r"the weights differ by .* of their norm"):
            check_nearly_same(ours, theirs * 1.1)
        theirs[1, :50] = 0
        with pytest.raises(Disagreement, match="of the weights are pruned in one"):
            check_nearly_same(ours, theirs)

    @pytest.mark.parametrize("axis", ["in", "out"])
    def test_a_wrong_kernel_is_found(self, axis):
        matrix = Matrix.random((64, 64), torch.float32, torch.device("cpu"))

        def reference(weight, terms):
            return select_nm_reference(weight, terms, 2, 4, axis=axis)

        check_sample(matrix, "ria", 4, lambda weight, terms: select_nm(weight, terms, 2, 4, axis=axis), reference)
        with pytest.raises(Disagreement, match="sampled rows"):
            check_sample(matrix, "ria", 4, lambda weight, terms: select_nm(weight, terms, 1, 4, axis=axis), reference)


class TestGate:
    def test_a_file_without_tests_has_failed(self, tmp_path):
        empty = tmp_path / "test_empty.py"
        empty.touch()
        assert RunTests().verdict(str(empty)) == "failed"
        assert RunTests().verdict(str(tmp_path / "test_absent.py")) == "failed"

    def test_reads_a_report(self, tmp_path):
        report = tmp_path / "tests.xml"
        report.write_text(
            "<testsuites><testsuite>"
            '<testcase classname="tests.kernels.test_good" name="test_a[cuda]"/>'
            '<testcase classname="tests.kernels.test_good" name="test_b[cuda]"><skipped/></testcase>'
            '<testcase classname="tests.kernels.test_bad" name="test_a[cuda]"/>'
            '<testcase classname="tests.kernels.test_bad" name="test_b[cuda]"><failure/></testcase>'
            '<testcase classname="tests.kernels.test_cpu" name="test_a[cpu]"/>'
            '<testcase classname="tests.kernels.test_skipped" name="test_a[cuda]"><skipped/></testcase>'
            "</testsuite></testsuites>"
        )
        gate = ReadReport(report, must_name="cuda")
        expected = {"good": "passed", "bad": "failed", "cpu": "unknown", "skipped": "unknown", "absent": "unknown"}
        files = {name: f"tests/kernels/test_{name}.py" for name in expected}
        assert {name: gate.verdict(file) for name, file in files.items()} == expected
        assert verdict_of(gate, [files["good"], files["cpu"], files["bad"]]) == ("failed", files["bad"])
        assert verdict_of(gate, [files["good"], files["cpu"]]) == ("unknown", files["cpu"])
        assert verdict_of(gate, [files["good"]])[0] == "passed"
        assert verdict_of(gate, [])[0] == "unknown"

    def test_no_report_shows_nothing(self, tmp_path):
        assert ReadReport(tmp_path / "none.xml").verdict("tests/kernels/test_select_nm.py") == "unknown"


class TestResults:
    def test_round_trip(self, tmp_path):
        path = tmp_path / "new" / "results.csv"
        append(path, [result(), result("published")])
        append(path, [result(wall=0.5, seconds=2000.0)])
        assert load(path) == [result(), result("published"), result(wall=0.5, seconds=2000.0)]
        assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
        assert len(path.read_text().splitlines()) == 4

    def test_another_file_is_left_alone(self, tmp_path):
        path = tmp_path / "other.csv"
        path.write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match="rename the file"):
            append(path, [result()])
        assert path.read_text() == "a,b\n1,2\n"

    def test_percentiles(self):
        made = Result.of("op", "us", (1, 2), torch.float32, [float(i) for i in range(11)], 0, "passed", setting())
        assert (made.p20, made.p50, made.p80, made.rounds, made.shape) == (2.0, 5.0, 8.0, 11, "1x2")

    def test_the_newest_comparison_counts(self):
        later = setting(date="2026-02-01T00:00:00+00:00")
        old = [result(), result("published", 50e-3)]
        new = [result("published", 70e-3, setting=later), result(setting=later)]
        (outcome,) = outcomes([*old, *new])
        assert outcome.ours.provider == "ace_triton"
        assert outcome.speedups == {"published": pytest.approx(70)}

    @pytest.mark.parametrize("tests", ["unknown", "failed"])
    def test_no_speedup_without_tests(self, tests):
        (outcome,) = outcomes([result(tests=tests), result("published", 1.0, tests=tests)])
        assert outcome.speedups == {}
        assert f"tests: {tests}" in page([outcome])

    def test_report(self, tmp_path):
        dry = setting(evidence="dry run")
        found = outcomes([result(), result("published", 0.07), result(setting=dry), result("published", setting=dry)])
        text = page(found)
        assert (
            "| prune 2:4, wanda | 576 x 576 (SmolLM2-135M q, o) | bfloat16 | 2 ms | 0.0 | published | 140 ms |" in text
        )
        assert "70x" in text
        assert "## dry run: a processor, 1 thread" in text
        plot(found, tmp_path / "plot.svg")
        assert "</svg>" in (tmp_path / "plot.svg").read_text()

    @pytest.mark.parametrize(("seconds", "shown"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 us")])
    def test_durations(self, seconds, shown):
        assert duration(seconds) == shown


def test_shapes():
    assert len(LAYERS) == 15
    assert len({(layer.rows, layer.cols) for layer in distinct()}) == len(distinct()) == 14
    assert labels_of(4096, 4096) == ["LLaMA-7B q, k, v, o", "Llama-3-8B q, o"]
    assert labels_of(1, 2) == []


BENCHMARK = """
import torch
from ace_triton.kernels.weight_sums import weight_sums
from benchmarks.harness.agreement import Disagreement
from benchmarks.harness.comparison import Comparison, Provider

TESTS = ({test_file!r},)

def check():
    if {wrong}:
        raise Disagreement("groups keep other weights")

def test_it(compare):
    weight = torch.ones(8, 16)
    compare(Comparison({name!r}, weight.shape, weight.dtype, lambda: weight_sums(weight),
                       (Provider("torch", lambda: (weight.abs().sum(1), weight.abs().sum(0))),), 512, check))
"""


def test_a_benchmark_refuses(tmp_path, plain_environment):
    results = tmp_path / "results.csv"
    cases = {"right": ("assert True", False), "untested": ("assert False", False), "other": ("assert True", True)}
    for name, (test, wrong) in cases.items():
        tests = tmp_path / f"test_{name}.py"
        tests.write_text(f"def test_op():\n    {test}\n")
        (tmp_path / f"bench_{name}.py").write_text(BENCHMARK.format(name=name, test_file=str(tests), wrong=wrong))
    options = ["--override-ini", "addopts=--import-mode=importlib", "--benchmark-only", "-p", "benchmarks.conftest"]
    command = [sys.executable, "-m", "pytest", "-q", *options, "--bench-device", "cpu"]
    command += ["--budget", "0.1", "--results", str(results)]
    files = [str(tmp_path / f"bench_{name}.py") for name in cases]
    environment = {**plain_environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "test_untested.py fails: the speed of a wrong operation means nothing" in done.stdout
    assert "Disagreement: groups keep other weights" in done.stdout
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    ours, theirs = load(results)
    assert (ours.op, ours.provider, theirs.provider, ours.tests) == ("right", "ace_triton", "torch", "passed")
    assert 0 < ours.p20 <= ours.p50 <= ours.p80 < 1
