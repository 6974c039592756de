"""The page of structured pruning says what each part of SAAP brings, from the record."""

from benchmarks.reports.structured import page


def result(method, perplexity, *, ratio=0.2, update="none"):
    facts = {"removed": ratio, "widths": {"channels": [64, 48]}, "seconds": 1.0, "speed": None}
    return {"model": "m", "method": method, "update": update, "ratio": ratio, "perplexity": perplexity, **facts}


def record(*results):
    return {"dense": {"m": {"perplexity": 30.0, "windows": 2, "processor": "a processor"}}, "results": list(results)}


def test_a_part_is_compared_with_the_better_of_the_methods_without_it():
    text = page(
        record(
            result("SAAP", 63.0),
            result("SAAP, vectors alone", 70.0),
            result("SAAP, elements alone", 60.0),
            result("SAAP, then group fine-tuning", 45.0, update="lstsq"),
            result("SAAP, then recovery", 50.0, update="lstsq"),
        )
    )
    assert "| fusion, one scale a structure | 20% | 63.00 | 60.00 | +5.0% |" in text
    assert "| group fine-tuning | 20% | 45.00 | 50.00 | -10.0% |" in text
    assert "stability" not in text


def test_a_part_waits_for_all_methods_without_it_at_its_ratio():
    text = page(record(result("SAAP", 63.0), result("SAAP, vectors alone", 70.0), result("SAAP", 40.0, ratio=0.1)))
    assert "What the parts of SAAP bring" not in text
