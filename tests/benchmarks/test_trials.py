"""The report on ideas that were measured, and the solvers of its trials."""

from __future__ import annotations

import json
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import typer

from ace_triton.prune import prune_linear
from ace_triton.sparsity import Sparsity
from ace_triton.statistics.activation import ActivationStats
from benchmarks.reports import exchanges, trial_metric, trials, trials_page
from benchmarks.reports.low_rank import residual_product
from benchmarks.reports.trial_rows import ROWS


def stats_of(width: int, seed: int = 0) -> tuple[torch.Tensor, ActivationStats]:
    """Correlated tokens with a mean, and their statistics."""
    torch.manual_seed(seed)
    tokens = torch.randn(200, width) @ (torch.eye(width) + torch.randn(width, width) / width**0.5) + 1
    return tokens, ActivationStats.from_tokens(tokens, gram=True)


def layer(width: int, rows: int, bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(width, rows, bias=bias)


def pruned_error(tokens: torch.Tensor, stats: ActivationStats, rows: int, **options: Any) -> float:
    """Mean squared output error of a pruned layer."""
    dense, pruned = layer(len(stats.gram.matrix), rows), layer(len(stats.gram.matrix), rows)
    prune_linear(pruned, stats, "trial", "2:4", **options)
    return float((dense(tokens) - pruned(tokens)).square().mean().detach())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (1, 4)])
def test_no_single_exchange_lowers_the_error_at_the_end(n, m):
    width, rows = 24, 5
    _, stats = stats_of(width)
    gram, dense = stats.gram.matrix.double(), torch.randn(rows, width)
    mask = dense.abs().unflatten(1, (-1, m)).argsort(2).argsort(2).ge(m - n).flatten(1)
    found = exchanges.exchange_masks(dense, mask, stats, exchanges.Settings(Sparsity(f"{n}:{m}"), 50))
    assert bool((found.unflatten(1, (-1, m)).sum(2) == n).all())

    def error(kept: torch.Tensor) -> torch.Tensor:
        lost = dense.double().masked_fill(kept, 0.0)
        return ((lost @ gram) * lost).sum(1)

    best = error(found)
    assert bool((best <= error(mask)).all())
    assert best.sum() < 0.9 * error(mask).sum()
    for first, second in product(range(width), repeat=2):
        possible = found[:, first] & ~found[:, second]
        if first // m == second // m and bool(possible.any()):
            other = found.clone()
            other[:, first], other[:, second] = False, True
            assert bool((error(other) >= best * (1 - 1e-4))[possible].all())


def test_exchanges_lower_the_error_with_and_without_a_fit():
    tokens, stats = stats_of(48)
    alone, exchanged = (pruned_error(tokens, stats, 32, sweeps=sweeps) for sweeps in (0, 3))
    assert exchanged < 0.9 * alone
    fitted, both = (pruned_error(tokens, stats, 32, fit=True, sweeps=sweeps) for sweeps in (0, 2))
    assert both < fitted < alone


def test_a_fit_is_that_of_the_package(monkeypatch):
    solvers = "ace_triton.solvers"
    monkeypatch.setattr(f"{solvers}.least_squares.has_fast_bfloat16", lambda device: False)
    for module in ("least_squares", "update"):
        monkeypatch.setattr(f"{solvers}.{module}.bfloat16_products", nullcontext)
    _, stats = stats_of(48)
    pair = layer(48, 32), layer(48, 32)
    prune_linear(pair[0], stats, "trial", "2:4", fit=True)
    prune_linear(pair[1], stats, "wanda", "2:4", update="lstsq")
    torch.testing.assert_close(pair[0].weight, pair[1].weight, rtol=1e-4, atol=1e-6)


def test_a_bias_takes_the_mean_error():
    tokens, stats = stats_of(48)
    own, bare = layer(48, 32, bias=True), layer(48, 16)
    dense, model = layer(48, 32, bias=True), torch.nn.Sequential(own, bare)
    biases = trial_metric.Biases(model, all_layers=True)
    trial_metric.biases.append(biases)
    try:
        prune_linear(own, stats, "trial", "2:4", fit=True, fit_center=1.0)
        prune_linear(bare, stats, "trial", "2:4")
    finally:
        trial_metric.biases.clear()
    assert bare.bias is not None
    assert float((dense(tokens) - own(tokens)).detach().mean(0).abs().max()) < 1e-4
    biases.remove()
    assert bare.bias is None
    assert own.bias is not None


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_centered_statistics_are_those_of_shifted_tokens(share):
    tokens, stats = stats_of(12)
    shifted = tokens - tokens.mean(0)
    wanted = (1 - share) * tokens.t() @ tokens + share * shifted.t() @ shifted
    torch.testing.assert_close(trial_metric.centered(stats, share).gram.matrix, wanted, rtol=1e-4, atol=1e-2)
    scale = trial_metric.trial(torch.zeros(1, 12), stats, score_center=share).scale
    torch.testing.assert_close(scale, wanted.diagonal().sqrt(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [20, 70])
def test_the_low_rank_product_is_the_best_one(rows):
    _, stats = stats_of(40)
    residual = torch.randn(rows, 40)
    gram = stats.gram.matrix
    lower = torch.linalg.cholesky(gram + 0.02 * gram.diagonal().mean() * torch.eye(40))
    best = torch.linalg.svdvals(residual @ lower)[6:].square().sum()
    found = residual_product(residual, stats, 6)
    assert int(torch.linalg.matrix_rank(found, rtol=1e-3)) == 6
    assert float(((residual - found) @ lower).square().sum()) < 1.01 * float(best)


@pytest.fixture
def files(tmp_path, tiny_checkpoint, some_text, monkeypatch) -> dict[str, Any]:
    for name, value in {"SAMPLES": 8, "LENGTH": 16, "WINDOW_LENGTH": 16}.items():
        monkeypatch.setattr(trials, name, value)
    text = str(some_text)
    whole = {"name": "small", "windows": 2, "seed": 0, "only": None, "list_rows": False, "most": None}
    return {"calibration": text, "evaluation": text, "model": str(tiny_checkpoint), "out": tmp_path, **whole}


def test_a_stopped_run_continues_and_other_windows_are_refused(files, capsys):
    trials.main(**{**files, "only": ["Wanda 2:4, exchanges"], "most": 0})
    chosen = ["fit 2:4, * every layer", "fit 2:4, rank 22"]
    trials.main(**{**files, "only": chosen})
    record = json.loads((files["out"] / "trials.json").read_text())
    rows = [
        "fit 2:4, centered by 1, biases in every layer",
        "fit 2:4, rank 22",
        "fit 2:4, biases in every layer",
    ]
    assert [entry["row"] for entry in record["results"]] == rows
    assert [entry["row"] for entry in record["layers"]] == ["Wanda 2:4, exchanges", *rows]
    assert all(0 < entry["error"] < 1 for entry in record["layers"])
    assert "- fit 2:4, rank 22" not in (files["out"] / "trials.md").read_text()
    with pytest.raises(typer.BadParameter, match="results of small have windows 2, not windows 3: use that number"):
        trials.main(**{**files, "windows": 3})
    capsys.readouterr()
    trials.main(**{**files, "list_rows": True})
    assert "fit 9:16: not measured\n" in capsys.readouterr().out


def record(perplexities: dict[str, float], errors: dict[str, float]) -> dict[str, Any]:
    """A record of one model. Rows took 10 CPU seconds, those with exchanges 15; rank 22 takes 5 % of the bytes."""
    rows = {row.name: row for row in ROWS}

    def entry(name: str, key: str, value: float) -> dict[str, Any]:
        pattern = rows[name].recipe.sparsity
        share = pattern.n / pattern.m + 1 / 16 + (0.0625 if "rank" in name else 0)
        seconds = 15.0 if "exchanges" in name else 10.0
        whole = {"model": "small", "row": name, "seed": 0, "processor": "P"}
        return {**whole, key: value, "seconds": seconds, "bytes": share}

    return {
        "models": {"small": {"windows": 2, "dense": 10.0}},
        "results": [entry(name, "perplexity", value) for name, value in perplexities.items()],
        "layers": [entry(name, "error", value) for name, value in errors.items()],
    }


def test_the_page_says_what_pays():
    perplexities = {"Wanda 2:4": 100, "Wanda 2:4, exchanges": 85, "fit 2:4": 50, "fit 2:4, exchanges": 49.5}
    shown = trials_page.page(record(perplexities, {**dict.fromkeys(perplexities, 0.5), "fit 2:4, exchanges": 0.4}))
    assert "| Wanda 2:4, exchanges | 0 | 85.0 | -15.0% | 15 | 0.5000 | +0.0% | 15.0 |" in shown
    runs = "1.5 times its CPU time (small, 1 run)"
    assert f"- Wanda 2:4, exchanges: perplexity -15.0% against Wanda 2:4, {runs}. It pays by this rule." in shown
    assert (
        f"- fit 2:4, exchanges: perplexity -1.0% against fit 2:4, {runs}. It does not pay: a fall of 2% would." in shown
    )
    assert "- For comparison, fit 2:4 on small: perplexity -50.0% and output error of layers +0.0% against" in shown
    assert shown.count("Not measured yet.") == 2


def test_exchanges_that_take_too_long_do_not_pay():
    found = record({"Wanda 2:4": 100, "Wanda 2:4, exchanges": 85}, {"Wanda 2:4": 0.5, "Wanda 2:4, exchanges": 0.4})
    found["results"][1]["seconds"] = 21.0
    assert "takes more than 2 times as long, so it does not pay." in trials_page.page(found)


def test_a_product_is_compared_with_the_pattern_of_its_bytes():
    errors = {"fit 2:4": 0.5, "fit 2:4, rank 22": 0.45, "fit 8:16": 0.4, "fit 9:16": 0.3, "fit 10:16": 0.2}
    shown = trials_page.page(record({}, errors))
    assert "| fit 2:4, rank 22 | 0 | 62.5% |  |  |  | 0.4500 | +50.0% | 10.0 |" in shown
    assert "- fit 2:4, rank 22: output error of layers +50.0% against fit 9:16, 1.0 times" in shown
