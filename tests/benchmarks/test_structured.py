"""The page of structured pruning says which method is best and what each part of SAAP brings, from the record."""

import pytest

from benchmarks.reports import structured
from benchmarks.reports.structured_page import page

SPEED = {"prompt": 119.0, "dense_prompt": 100.0, "decode": 11.0, "dense_decode": 10.0, "promised": 1.2}


def result(method, perplexity, *, ratio=0.2, update="none", seed=0, steps=0, seconds=1.0, speed=None):
    facts = {"removed": ratio, "widths": {"channels": [64, 48]}, "seconds": seconds, "speed": speed}
    own = {"seed": seed, "steps": steps, "perplexity": perplexity}
    return {"model": "m", "method": method, "update": update, "ratio": ratio, **own, **facts}


def record(*results):
    return {"dense": {"m": {"perplexity": 30.0, "windows": 2, "processor": "a processor"}}, "results": list(results)}


def test_a_part_is_compared_with_the_better_of_the_methods_without_it():
    text = page(
        record(
            result("SAAP", 63.0),
            result("SAAP, vectors alone", 70.0),
            result("SAAP, elements alone", 60.0),
            result("SAAP, then group fine-tuning", 45.0, update="lstsq", steps=60),
            result("SAAP, then recovery", 50.0, update="lstsq", steps=60),
        )
    )
    assert "| fusion, one scale a structure | 20% | 1 | 63.00 | 60.00 | +5.0% |" in text
    assert "| group fine-tuning | 20% | 1 | 45.00 | 50.00 | -10.0% |" in text
    assert "stability" not in text


def test_a_part_waits_for_all_methods_without_it_at_its_ratio():
    text = page(record(result("SAAP", 63.0), result("SAAP, vectors alone", 70.0), result("SAAP", 40.0, ratio=0.1)))
    assert "What the parts of SAAP bring" not in text


def test_it_says_where_saap_is_among_the_baselines():
    text = page(
        record(
            result("SAAP", 50.0, update="lstsq", seconds=30.0),
            result("FLAP", 60.0, update="bias", seconds=20.0),
            result("depth (ShortGPT)", 70.0),
            result("FLAP", 48.0, update="lstsq"),
            result("SAAP, then recovery", 40.0, update="lstsq", steps=60),
        )
    )
    assert (
        "- At 20%, without training, FLAP with lstsq is best: perplexity 48.00. SAAP with lstsq is below every "
        "baseline as published: the best of 2 is FLAP, 60.00 (+20.0%). SAAP with lstsq is not below every "
        "baseline with lstsq: the best of 1 is FLAP, 48.00 (-4.0%). It takes 1.50 times the CPU seconds of FLAP as "
        "published. With training, SAAP, then recovery is best: 40.00 after 60 steps, 1.33 times the dense."
    ) in text


def test_seeds_are_counted_and_averaged():
    text = page(
        record(
            result("SAAP", 50.0, update="lstsq"),
            result("SAAP", 54.0, update="lstsq", seed=1),
            result("FLAP", 51.0, update="bias"),
            result("FLAP", 53.0, update="bias", seed=1),
        )
    )
    assert "SAAP with lstsq is in 1 of 2 seeds below every baseline as published" in text
    assert "| SAAP | lstsq | 20% | 0 | 20.0% | width 64 to 48 | 1 | 52.00 ± 2.83 (2) | 1.73x |" in text


def test_speed_is_a_share_of_the_promised_rise():
    text = page(record(result("SAAP", 50.0, speed=SPEED)))
    assert (
        "It is reached for prompts in 1 of 1 rows (median 0.95), for generation in 0 of 1 rows (median 0.50)." in text
    )
    assert "| 1.19x | 0.95 | 11.0 | 10.0 | 1.10x | 0.50 | 1.20x |" in text


@pytest.mark.parametrize("name", structured.TRAINED)
def test_training_reads_each_sequence_once(name):
    training = structured.TRAINED[name]
    assert 256 * training.steps <= structured.LENGTH * training.sequences


def test_rows_have_names_of_their_own():
    names = [structured.label(cell) for cell in structured.cells(every=True)]
    assert len(set(names)) == len(names)
    assert "20% SAAP, then recovery for five minutes, lstsq" in names
