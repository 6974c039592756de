"""The page about equal speed says what its record says, and the picture shows it."""

from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer

from ace_triton.study.workbench import Protocol
from benchmarks.reports.record import read_record
from benchmarks.reports.shrink_speed import PICTURE, of_model, setting_of
from benchmarks.reports.shrink_speed_page import BITS, FORMS, Form, page, picture

SVG = "{http://www.w3.org/2000/svg}"
SETTING = setting_of(Protocol("model", "calibration", "evaluation"))
SHRUNKEN = {0.0: (4.0, 30.0), 0.1: (4.2, 40.0), 0.2: (4.4, 50.0), 0.3: (4.8, 80.0)}
"""Speed and perplexity by the removed share, in 8 bits."""


def record(alone, both, *, leave_out=()):
    """A record in which 8:16 and 2:4 alone, and both, have these speeds and perplexities."""
    values = {form: SHRUNKEN[form.ratio] for form in FORMS if form.bits and not form.pattern}
    values |= {Form(ratio): (0.25 * speed, perplexity) for ratio, (speed, perplexity) in SHRUNKEN.items()}
    values |= {Form(pattern="8:16", bits=BITS): alone, Form(pattern="2:4", bits=BITS): (alone[0], 2 * alone[1])}
    values[Form(0.2, "8:16", BITS)] = both
    chosen = [form for form in values if str(form) not in leave_out]
    sizes = [
        {"form": asdict(form), "perplexity": values[form][1], "bytes": 10**8, "processor": "a CPU"} for form in FORMS
    ]
    facts = {"rounds": 3, "new_tokens": 8, "processor": "a CPU"}
    speeds = [{"form": asdict(form), "over_dense": values[form][0], **facts} for form in chosen]
    return {"models": {"a model": {"setting": SETTING, "perplexity": sizes, "speed": speeds}}}


def test_it_compares_each_form_with_shrink_alone_at_its_own_speed():
    text = page(record(alone=(4.3, 60.0), both=(5.0, 70.0)))
    # Between 40 and 50, half way on the scale of logarithms: 44.7, which is 25 % below 60.
    assert (
        "8:16, 8 bits runs at 4.30 times the dense speed with perplexity 60.0. Shrink alone has 44.7 at that speed, "
        "between shrunken 10%, 8 bits and shrunken 20%, 8 bits, 25% lower." in text
    )
    assert (
        "shrunken 20% then 8:16, 8 bits runs at 5.00 times the dense speed with perplexity 70.0. No shrunken form is "
        "as fast; the fastest, shrunken 30%, 8 bits, reaches 4.80 with 80.0." in text
    )
    assert "No n:m form alone is as fast as shrunken 20% then 8:16, 8 bits; the fastest" in text
    assert (
        "**At equal speed, shrunken 20% then 8:16, 8 bits has a lower perplexity than shrink alone. "
        "The other n:m forms do not.**" in text
    )
    assert "| 8:16, 8 bits | 60.00 | 2.00x | 100 MB | 4.30x |" in text


def test_it_says_that_shrink_alone_is_better_than_every_slower_form():
    text = page(record(alone=(3.0, 60.0), both=(3.0, 70.0)))
    assert "dense, 8 bits is not slower (4.00) and has 30.0, 50% lower." in text
    assert "8:16, 8 bits is as fast as shrunken 20% then 8:16, 8 bits and has perplexity 60.0, 14% lower." in text
    assert (
        "**At equal speed, shrink alone (or nothing at all) has a lower perplexity than every n:m form here.**" in text
    )


def test_it_decides_nothing_before_all_forms_are_measured():
    text = page(record((3.0, 60.0), (3.0, 70.0), leave_out=["2:4, 8 bits"]))
    assert "Not decided yet. These forms are not measured: 2:4, 8 bits." in text
    assert "At equal speed" not in text


def test_the_picture_has_a_mark_for_every_form():
    content = record(alone=(4.3, 60.0), both=(5.0, 70.0))
    root = ElementTree.fromstring(picture(content))
    circles = [circle.get("class") for circle in root.iter(f"{SVG}circle")]
    assert (circles.count("ours"), circles.count("beaten")) == (1 + 8, 1 + 1)  # The legend has one of each.
    crosses = [path for path in root.iter(f"{SVG}path") if path.get("class") == "theirs"]
    assert len(crosses) == 1 + 2
    assert "shrunken 20% then 8:16, 8 bits 70.0 at 5.00" in root.find(f"{SVG}desc").text


def test_results_of_another_setting_are_not_mixed():
    content = {"models": {}}
    of_model(content, "a model", SETTING)
    with pytest.raises(typer.BadParameter, match="measured with windows 20, not 40: give the same, or remove a model"):
        of_model(content, "a model", {**SETTING, "windows": 40})


def test_the_page_and_the_picture_are_those_of_the_record():
    docs = Path(__file__).resolve().parents[2] / "docs"
    content = read_record(docs / "shrink-speed.json", models={})
    assert (docs / "shrink-speed.md").read_text() == page(content)
    assert (docs / PICTURE).read_text() == picture(content)
