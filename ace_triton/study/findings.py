"""What the numbers of a study say, computed from them, noise included."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from ..metrics import metric
from .cells import Variant
from .norms import NEAR_POLE
from .tally import Measure, Tally, listed, shown_sparsity, shown_variant

Verdict = Literal["holds", "fails", "open", "note"]

FROM_BEST: tuple[Verdict, ...] = ("holds", "open", "fails")
"""What a claim can be."""

ACE, RIA, WANDA = Variant("ace"), Variant("ria"), Variant("wanda")
PUBLISHED_ACE = Variant("ace-paper")

MEANING = (
    "Mean change of perplexity ± its standard error over the draws (length and seed) that both share; lower is better."
)

FEWEST_PAIRS = 3
"""Paired draws below which no ordering is stated."""

SHORT, LONG = 16, 2048
MOST_TIME, MOST_PERPLEXITY = 0.10, 1.05
"""The end-to-end aim: ACE at :data:`SHORT` against Wanda at :data:`LONG`."""


@dataclass(frozen=True)
class Finding:
    """A statement for the top of the page.

    Attributes:
        verdict: of a claim, whether it holds, fails, or is open within noise or for lack of cells; "note"
            for what is no claim.
        headline: one line.
        text: the figures behind it.
    """

    verdict: Verdict
    headline: str
    text: str


@dataclass(frozen=True)
class Comparison:
    """One method against another over paired draws of calibration text.

    Attributes:
        change: mean relative change, by the mean log ratio, of perplexity or of another measure; negative where
            the first is better.
        error: standard error of that mean, as a relative change; NaN of a single pair.
        pairs: draws (length and seed) that both were measured on.
    """

    change: float
    error: float
    pairs: int

    @classmethod
    def of(cls, ratios: Collection[float]) -> Comparison | None:
        """From log ratios of paired draws; None of no draw."""
        if not ratios:
            return None
        error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
        return cls(math.expm1(statistics.mean(ratios)), error, len(ratios))

    @property
    def verdict(self) -> Verdict:
        """Whether the first is better by more than two standard errors, worse by as much, or neither."""
        if self.pairs < FEWEST_PAIRS or abs(self.change) <= 2 * self.error:
            return "open"
        return "holds" if self.change < 0 else "fails"

    def within(self, most: float) -> Verdict:
        """Whether the first is at most so many times the other, two standard errors counted in."""
        beyond = math.log1p(self.change) - math.log(most)
        if self.pairs < FEWEST_PAIRS or not abs(beyond) >= 2 * self.error:
            return "open"
        return "holds" if beyond <= 0 else "fails"


def compare(
    tally: Tally, one: Variant, other: Variant, sparsity: str, measure: Measure | None = None
) -> Comparison | None:
    """By perplexity, or by another measure; None where no draw was measured with both."""
    return Comparison.of(tally.paired(one, other, sparsity, measure).values())


def findings(tally: Tally) -> list[Finding]:
    """Everything that the study's cells allow to be said."""
    claims = [claim(tally, sparsity) for claim in (ordering, end_to_end) for sparsity in tally.sparsities]
    seen = (longer_calibration(tally), nearest_text(tally), poles(tally))
    return [finding for finding in (*claims, *seen) if finding is not None]


def ordering(tally: Tally, sparsity: str) -> Finding | None:
    """Whether ACE <= RIA <= Wanda, as the paper has it."""
    steps = [(ACE, RIA), (RIA, WANDA)]
    found = [(one, other, compare(tally, one, other, sparsity)) for one, other in steps]
    measured = [(one, other, c) for one, other, c in found if c is not None]
    if len(measured) < len(steps):
        return None
    verdicts = [comparison.verdict for _, _, comparison in measured]
    shown = shown_sparsity(sparsity)
    if "fails" in verdicts:
        wrong = [
            f"{shown_variant(one)} is behind {shown_variant(other)}"
            for one, other, c in measured
            if c.verdict == "fails"
        ]
        headline = f"{shown}: the paper's order ACE ≤ RIA ≤ Wanda does not hold here; {listed(wrong)}"
    elif verdicts == ["holds", "holds"]:
        headline = f"{shown}: the paper's order ACE ≤ RIA ≤ Wanda holds here"
    else:
        unclear = [
            f"between {shown_variant(one)} and {shown_variant(other)}"
            for one, other, c in measured
            if c.verdict == "open"
        ]
        pairs = ", nor ".join(unclear)
        headline = f"{shown}: the paper's order ACE ≤ RIA ≤ Wanda is not settled; no clear difference {pairs}"
    beside = compare(tally, PUBLISHED_ACE, WANDA, sparsity)
    told = [*measured, *([(PUBLISHED_ACE, WANDA, beside)] if beside is not None else [])]
    text = "; ".join(f"{shown_variant(one)} against {shown_variant(other)}: {_change(c)}" for one, other, c in told)
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
        f"{seconds:,.1f} against {base_seconds:,.1f} CPU seconds, perplexity {quality.mean:,.1f} "
        f"({_seeds(len(quality.values))}) against {base.mean:,.1f} ({_seeds(len(base.values))}). Aim: at most "
        f"{MOST_TIME:.0%} of the time, perplexity at most {MOST_PERPLEXITY - 1:.0%} above"
        + ("." if whole else f", for L={SHORT} against L={LONG}, which is not measured yet.")
    )
    return Finding(reached if whole else "open", headline, text)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Of several claims made at once; "open" of none."""
    return max(verdicts, key=FROM_BEST.index, default="open")


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def longer_calibration(tally: Tally) -> Finding | None:
    """What longer sequences are worth, beside what the choice of method is worth."""
    parts = []
    for sparsity in tally.sparsities:
        for variant in (WANDA, RIA, ACE):
            spreads = [(n, s) for n in tally.lengths if (s := tally.perplexity(variant, sparsity, n)) is not None]
            if len(spreads) > 1:
                (short, first), (long, last) = spreads[0], spreads[-1]
                change = last.mean / first.mean - 1
                parts.append(
                    f"{shown_variant(variant)} at {shown_sparsity(sparsity)} {change:+.1%} (L={short} to {long})"
                )
    if not parts:
        return None
    return Finding("note", "What longer calibration sequences change", f"Perplexity: {'; '.join(parts)}.")


def nearest_text(tally: Tally) -> Finding | None:
    """Which method's next-token distributions stay nearest to the dense model's."""
    parts = []
    for sparsity in tally.sparsities:
        far = [(s.cell.variant, s.divergence) for s in tally.samples(sparsity) if s.cell and s.divergence]
        if len(far) > 1:
            variant, least = min(far, key=lambda pair: pair[1].mean)
            parts.append(
                f"at {shown_sparsity(sparsity)} {shown_variant(variant)} (mean KL {least.mean:.2f} nats, same top "
                f"token at {least.agreement:.0%} of {least.tokens:,} positions)"
            )
    if not parts:
        return None
    return Finding("note", "Nearest to the dense model's next-token distributions", f"{listed(parts)}. One seed.")


def poles(tally: Tally) -> Finding | None:
    """How often VarP comes near its pole."""
    norms = tally.results.norms
    if norms is None or not norms.inputs:
        return None
    chosen = metric("varp").options["norm"]
    parts = []
    for place, pole in enumerate(norms.inputs[0].poles):
        near = sum(entry.poles[place].channels > 0 for entry in norms.inputs)
        largest = max(entry.poles[place].largest for entry in norms.inputs)
        parts.append(f"{pole.norm} {near} of {len(norms.inputs)} (largest f {largest:,.0f})")
    return Finding(
        "note",
        f"VarP's 1 / (1 - y) comes near its pole; the default normaliser is {chosen}",
        f"Inputs with a channel whose factor f is {NEAR_POLE:g} or more: {'; '.join(parts)}. L={norms.length}.",
    )
