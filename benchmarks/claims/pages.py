"""Draws the pages of docs/study and docs/curve from their records, with the claims of ACE's paper and our targets.

python -m benchmarks.claims.pages
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from ace_triton.study.journal import Results, read_results
from ace_triton.study.page import environment, page_values, write_text
from ace_triton.study.tally import Tally

from . import findings, goals

STUDIES = (Path("docs/study"), Path("docs/curve"))
"""Folders with a results.jsonl, from the root of the repository; each page is written beside it."""

TEMPLATE = "claims.html.j2"


@dataclass(frozen=True)
class Group:
    """Claims of one kind.

    Attributes:
        title, meaning: heading, and how to read the figures.
        findings: what the study says about each claim.
    """

    title: str
    meaning: str
    findings: list[findings.Finding]


def page(results: Results) -> str:
    """A study's page with what it says about the claims, as HTML."""
    tally = Tally(results)
    groups = (
        Group(
            "The claims of ACE's paper",
            "ACE is this package's default form of the method. The published form, as far as it is known, is the "
            "method ace-paper.",
            findings.findings(tally),
        ),
        Group("The targets of this project", goals.MEANING, goals.goals(tally)),
    )
    template = environment(Path(__file__).parent).get_template(TEMPLATE)
    return template.render(page_values(results), claims=[group for group in groups if group.findings])


def page_of(folder: Path, results: Results) -> Path:
    """Where the page of a study is."""
    return folder / f"{results.setting.model.rpartition('/')[2]}.html"


def main() -> None:
    """Write every page."""
    for folder in STUDIES:
        results = read_results(folder)
        path = page_of(folder, results)
        write_text(path, page(results))
        typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
