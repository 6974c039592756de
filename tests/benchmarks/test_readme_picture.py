"""The README's picture: small, well formed, the same for the same records, and true to them."""

import re
from pathlib import Path
from xml.etree import ElementTree

from ace_triton.study.journal import read_results
from ace_triton.study.tally import Tally
from benchmarks.reports.readme_picture import HEIGHT, PICTURE, WIDTH, picture

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def drawn() -> str:
    return picture(Tally(read_results(ROOT / "docs" / "curve")))


def test_it_shows_the_records():
    """Made anew it is the file that is there."""
    assert (ROOT / PICTURE).read_text() == drawn()


def test_it_is_small_and_says_in_words_what_it_shows():
    text = drawn()
    assert len(text) < 40_000
    root = ElementTree.fromstring(text)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    description = root.find(f"{SVG}desc").text
    assert re.match(r"Dense 35\.\d\. On the Pareto front: ", description)
    named = " ".join(element.text for element in root.iter(f"{SVG}text"))
    for perplexity in re.findall(r"([\d.]+) in \d+ s", description):
        assert f": {perplexity}" in named


def test_everything_lies_inside_and_the_front_falls():
    root = ElementTree.fromstring(drawn())
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) > 10
    assert all(0 < float(c.get("cx")) < WIDTH and 0 < float(c.get("cy")) < HEIGHT for c in circles)
    marks = {(float(c.get("cx")), float(c.get("cy"))) for c in circles if c.get("class") == "ours"}
    (front,) = (path.get("d") for path in root.iter(f"{SVG}path") if path.get("class") == "front")
    corners = [float(number) for number in re.findall(r"[\d.]+", front)]
    steps = list(zip(corners[:-1:2], corners[1::2], strict=True))
    assert steps == sorted(steps)
    assert set(steps) <= marks
