"""Whether the claims of ACE's paper hold in a study, noise included."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ace_triton.recipe import Recipe
from ace_triton.study.cells import Cell
from ace_triton.study.comparison import FEWEST_PAIRS, Comparison, compare
from ace_triton.study.tally import Tally, listed, shown_sparsity, shown_variant

Verdict = Literal["holds", "open", "fails"]

FROM_BEST: tuple[Verdict, ...] = ("holds", "open", "fails")

ACE, RIA, WANDA, PUBLISHED_ACE = map(Cell, map(Recipe, ("ace", "ria", "wanda", "ace-paper")))

MEANING = (
    "Mean change of perplexity ± its standard error over paired draws (the same length and seed for both methods). "
    "Lower is better."
)

SHORT, LONG = 16, 2048
MOST_TIME, MOST_PERPLEXITY = 0.10, 1.05
"""The paper's end-to-end claim: ACE at SHORT against Wanda at LONG."""


@dataclass(frozen=True)
class Finding:
    """A claim and what the study says about it.

    Attributes:
        verdict: "open" if noise is too large, or cells are missing.
        headline: one line.
        text: the figures behind it.
    """

    verdict: Verdict
    headline: str
    text: str


def verdict_on(comparison: Comparison) -> Verdict:
    """Whether the first recipe is better: open unless the difference is clear."""
    if not comparison.clear:
        return "open"
    return "holds" if comparison.change < 0 else "fails"


def within(comparison: Comparison, most: float) -> Verdict:
    """Whether the first recipe has at most ``most`` times the other's measure, by two standard errors."""
    above = math.log1p(comparison.change) - math.log(most)
    if comparison.pairs < FEWEST_PAIRS or not abs(above) >= 2 * comparison.error:
        return "open"
    return "holds" if above <= 0 else "fails"


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on several claims together; "open" without any."""
    return max(verdicts, key=FROM_BEST.index, default="open")


def findings(tally: Tally) -> list[Finding]:
    """All claims that the study has cells for."""
    claims = [claim(tally, sparsity) for claim in (ordering, end_to_end) for sparsity in tally.sparsities]
    return [finding for finding in claims if finding is not None]


def ordering(tally: Tally, sparsity: str) -> Finding | None:
    """Whether ACE <= RIA <= Wanda, as in the paper."""
    steps = [(ACE, RIA), (RIA, WANDA)]
    found = [(one, other, compare(tally, one, other, sparsity)) for one, other in steps]
    measured = [(one, other, c) for one, other, c in found if c is not None]
    if len(measured) < len(steps):
        return None
    verdicts = [verdict_on(comparison) for _, _, comparison in measured]
    claim = f"{shown_sparsity(sparsity)}: the paper's order ACE ≤ RIA ≤ Wanda"
    if "fails" in verdicts:
        wrong = [
            f"{shown_variant(one)} is worse than {shown_variant(other)}"
            for one, other, c in measured
            if verdict_on(c) == "fails"
        ]
        headline = f"{claim} does not hold here: {listed(wrong)}"
    elif verdicts == ["holds", "holds"]:
        headline = f"{claim} holds here"
    else:
        unclear = [
            f"between {shown_variant(one)} and {shown_variant(other)}"
            for one, other, c in measured
            if verdict_on(c) == "open"
        ]
        headline = f"{claim} is open: no clear difference {listed(unclear)}"
    published = compare(tally, PUBLISHED_ACE, WANDA, sparsity)
    pairs = [*measured, *([(PUBLISHED_ACE, WANDA, published)] if published is not None else [])]
    text = "; ".join(f"{shown_variant(one)} against {shown_variant(other)}: {_change(c)}" for one, other, c in pairs)
    return Finding(worst(verdicts), headline, f"{text}. {MEANING}")


def _change(comparison: Comparison) -> str:
    if comparison.pairs < 2:
        return f"{comparison.change:+.1%} (a single draw)"
    return f"{comparison.change:+.1%} ± {comparison.error:.1%} over {comparison.pairs} paired draws"


def end_to_end(tally: Tally, sparsity: str) -> Finding | None:
    """ACE on the shortest sequences against Wanda on the longest: time and perplexity."""
    ours = [n for n in tally.lengths if tally.perplexity(ACE, sparsity, n)]
    theirs = [n for n in tally.lengths if tally.perplexity(WANDA, sparsity, n)]
    if not ours or not theirs or ours[0] == theirs[-1]:
        return None
    short, long = ours[0], theirs[-1]
    quality, base = tally.perplexity(ACE, sparsity, short), tally.perplexity(WANDA, sparsity, long)
    seconds, base_seconds = tally.cpu_seconds(ACE, sparsity, short), tally.cpu_seconds(WANDA, sparsity, long)
    assert quality is not None
    assert base is not None
    assert seconds is not None
    assert base_seconds is not None
    time, excess = seconds / base_seconds, quality.mean / base.mean
    reached: Verdict = "holds" if time <= MOST_TIME and excess <= MOST_PERPLEXITY else "fails"
    whole = (short, long) == (SHORT, LONG)
    headline = (
        f"{shown_sparsity(sparsity)}: ACE at L={short} takes {time:.1%} of the time of Wanda at L={long}, "
        f"at a perplexity {abs(excess - 1):.1%} {'above' if excess >= 1 else 'below'}"
    )
    text = (
        f"{seconds:,.1f} against {base_seconds:,.1f} CPU seconds; perplexity {quality.mean:,.1f} "
        f"({_seeds(len(quality.values))}) against {base.mean:,.1f} ({_seeds(len(base.values))}). Claimed: at most "
        f"{MOST_TIME:.0%} of the time, at a perplexity at most {MOST_PERPLEXITY - 1:.0%} above"
        + ("." if whole else f", for L={SHORT} against L={LONG}, which is not measured yet.")
    )
    return Finding(reached if whole else "open", headline, text)


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
