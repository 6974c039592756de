"""The picture of trade-offs shows all forms of a model by their names, and no name covers anything."""

import copy
import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.reports.labels import Box, placed
from benchmarks.reports.tradeoff import read
from benchmarks.reports.tradeoff_picture import LEAST_FORMS, picture
from benchmarks.reports.tradeoff_points import front_of, points_of, shown_speeds, size_cost

SVG = "{http://www.w3.org/2000/svg}"
CONTENT = read(Path(__file__).resolve().parents[2] / "docs")
MODEL = "SmolLM2-135M"
POINTS = points_of(CONTENT["models"][MODEL])
LEGEND = 3
"""Marks in the legend: a cross and two circles."""


@pytest.fixture(scope="module")
def drawn():
    return picture(CONTENT)


@pytest.fixture(scope="module")
def root(drawn):
    return ElementTree.fromstring(drawn)


def text_box(element) -> Box:
    x, y, width = float(element.get("x")), float(element.get("y")), 7 * len(element.text)
    left = x - {"middle": width / 2, "end": width}.get(element.get("text-anchor"), 0)
    return Box(left, y - 11, left + width, y + 3)


def mark_boxes(root) -> list[Box]:
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    corners = [path.get("d") for path in root.iter(f"{SVG}path") if path.get("class") == "theirs"]
    crosses = [tuple(float(n) + 4.5 for n in re.findall(r"[\d.]+", d)[:2]) for d in corners]
    return [Box(x - 4.5, y - 4.5, x + 4.5, y + 4.5) for x, y in (*circles, *crosses)]


def test_no_two_words_overlap_and_no_word_covers_a_mark(root):
    texts = [(element.text, text_box(element)) for element in root.iter(f"{SVG}text")]
    assert len(texts) > 30
    for (words, box), (other_words, other) in itertools.combinations(texts, 2):
        assert not box.overlaps(other), f"{words} covers {other_words}"
    for words, box in texts:
        assert not any(box.overlaps(mark) for mark in mark_boxes(root)), f"{words} covers a mark"


def test_every_form_is_drawn_with_its_name_in_each_panel_that_has_it(root):
    models = (points_of(found, shown_speeds(CONTENT, found)) for found in CONTENT["models"].values())
    points = [point for found in models if len(found) >= LEAST_FORMS for point in found]
    timed = [point for point in points if point.faster is not None]
    expected = sorted(str(point.form) for point in (*points, *timed))
    names = set(expected)
    assert sorted(element.text for element in root.iter(f"{SVG}text") if element.text in names) == expected
    assert len(mark_boxes(root)) == len(expected) + LEGEND
    front = front_of(POINTS, size_cost)
    pruned_front = sum(point.pruned for point in front)
    full = [circle for circle in root.iter(f"{SVG}circle") if circle.get("class") == "ours"]
    assert len(full) >= 1 + pruned_front > 1
    described = "; ".join(f"{point.form} {point.perplexity:.1f}" for point in front)
    assert f"{MODEL}: on the front of size {described}" in root.find(f"{SVG}desc").text


def test_the_second_axis_is_the_ratio_of_the_tables(root, drawn):
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert "times the tokens a second of dense fp32, one thread" in words
    assert f"speeds: {CONTENT['shown']}" in words
    changed = copy.deepcopy(CONTENT)
    for machine in changed["models"][MODEL]["machines"]:
        for entry in machine["speed"]:
            entry["tokens_per_second"] *= 3
    assert picture(changed) == drawn


def test_a_model_with_few_forms_is_named_and_not_drawn():
    content = copy.deepcopy(CONTENT)
    content["models"] = {MODEL: content["models"][MODEL], "a small study": copy.deepcopy(content["models"][MODEL])}
    few = content["models"]["a small study"]
    few["perplexity"], few["machines"] = few["perplexity"][:3], []
    text = picture(content)
    assert ">Not drawn, since fewer than 4 forms are measured: a small study, 3 measured</text>" in text
    assert text.count('class="title">') == 2


def test_names_of_marks_at_one_place_get_places_of_their_own():
    marks = [(100.0, 100.0, f"form number {n}") for n in range(6)]
    labels = placed(marks, Box(0, 0, 300, 200))
    assert sorted(label.words for label in labels) == [words for *_, words in marks]
    for one, other in itertools.combinations(labels, 2):
        assert not one.box.overlaps(other.box)
    with pytest.raises(ValueError, match="no free place for all of 6 names: make the picture larger"):
        placed(marks, Box(50, 80, 250, 120))
