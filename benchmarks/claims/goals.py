"""This project's targets for perplexity and time, and whether the study in docs/curve meets them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ace_triton.study.cells import Cell
from ace_triton.study.comparison import Comparison, compare
from ace_triton.study.recipes_grid import PATTERN, SPARSEGPT
from ace_triton.study.records import CellResult
from ace_triton.study.tally import Draw, Tally, listed, shown_sparsity, shown_variant

from .findings import ACE, FROM_BEST, RIA, WANDA, Finding, Verdict, within, worst

PATTERNS = ("0.5", "2:4", "4:8")
"""The sparsities at which a metric alone is judged."""

MOST_PERMUTED = 0.95
"""Perplexity with permuted channels, over the same metric alone."""

MOST_OF_WANDA, MOST_OF_SPARSEGPT = 0.45, 0.75
"""Perplexity with a weight update, over Wanda's and SparseGPT's."""

MOST_RECOVERED = {5.0: 0.33, 20.0: 0.25}
"""Perplexity after so many minutes of recovery, over Wanda's."""

MEANING = (
    "Ratios are geometric means ± their standard error over the draws (length and seed) that both were measured on, by "
    "tokens in a window. A ratio within two standard errors of its target is open."
)


def goals(tally: Tally) -> list[Finding]:
    """All targets that the study has cells for; none for a study without recipes."""
    if not tally.recipes:
        return []
    permuted = [permutation(tally, v) for v in tally.recipes if v == v.alone.with_recipe(permute=True)]
    recovered = [recovery(tally, minutes) for minutes in MOST_RECOVERED]
    found = [metric_alone(tally), *permuted, weight_update(tally), *recovered, dominance(tally)]
    return [finding for finding in found if finding is not None]


@dataclass(frozen=True)
class Claim:
    """One method has at most ``most`` times another's perplexity, over windows of every length, or its time.

    Attributes:
        comparisons: by what they compare: "512" for perplexity over windows of 512 tokens, or "CPU time".
        most: the upper bound of the ratio.
        missing: window lengths that no draw was measured over with both.
        verdict: the worst verdict; at best open if something is missing.
    """

    comparisons: Mapping[str, Comparison]
    most: float
    missing: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The worst verdict on the comparisons."""
        verdicts = [within(comparison, self.most) for comparison in self.comparisons.values()]
        return worst([*verdicts, "open"] if self.missing else verdicts)

    @property
    def first(self) -> float:
        """The ratio of the first comparison."""
        return 1 + next(iter(self.comparisons.values())).change

    def __str__(self) -> str:
        """ "0.441 ± 0.004 (512; 5 pairs), 0.452 ± 0.006 (2,048; 2 pairs)"."""
        shown = [
            f"{_ratio(comparison)} ({name}; {comparison.pairs} pair{'s' if comparison.pairs != 1 else ''})"
            for name, comparison in self.comparisons.items()
        ]
        return ", ".join([*shown, *(f"not measured over {length}" for length in self.missing)])


def perplexity_claim(tally: Tally, one: Cell, other: Cell, sparsity: str, most: float) -> Claim | None:
    """None if the first window length was not measured with both."""
    lengths = tally.results.setting.window_lengths
    compared = {f"{n:,}": compare(tally, one, other, sparsity, tally.over(n)) for n in lengths}
    found = {name: comparison for name, comparison in compared.items() if comparison is not None}
    missing = tuple(name for name, comparison in compared.items() if comparison is None)
    return Claim(found, most, missing) if f"{lengths[0]:,}" in found else None


def time_claim(tally: Tally, one: Cell, other: Cell, sparsity: str) -> Claim | None:
    """One takes no more CPU time than the other; None without a pair."""
    comparison = compare(tally, one, other, sparsity, cpu_time)
    return None if comparison is None else Claim({"CPU time": comparison}, 1.0)


def cpu_time(found: CellResult) -> float:
    """CPU seconds of pruning and recovery."""
    return found.cpu_seconds_in_all


def metric_alone(tally: Tally) -> Finding | None:
    """ACE against the better of Wanda and RIA, at each sparsity and on average."""
    verdicts: list[Verdict] = []
    ratios: dict[Draw, list[float]] = defaultdict(list)
    parts = []
    for sparsity in PATTERNS:
        between = compare(tally, WANDA, RIA, sparsity)
        if between is None:
            continue
        best = WANDA if between.change <= 0 else RIA
        claim = perplexity_claim(tally, ACE, best, sparsity, 1.0)
        if claim is not None:
            verdicts.append(claim.verdict)
            parts.append(f"{shown_sparsity(sparsity)}: {claim} times {shown_variant(best)}'s")
            for draw, ratio in tally.paired(ACE, best, sparsity).items():
                ratios[draw].append(ratio)
    mean = Comparison.of([sum(found) / len(found) for found in ratios.values() if len(found) == len(verdicts)])
    if mean is None:
        return None
    missing = len(PATTERNS) - len(verdicts)
    whole: Verdict = "open" if missing else "holds"
    verdict = worst([*verdicts, within(mean, 1.0), whole])
    headline = f"Metric alone: on average ACE has {_ratio(mean)} times the perplexity of the better of Wanda and RIA"
    target = f"Target: no worse at {listed([shown_sparsity(s) for s in PATTERNS])}, and better on average"
    not_yet = f"; {missing} of these not measured yet" if missing else ""
    return Finding(verdict, headline, f"{'; '.join(parts)}. {target}{not_yet}.")


def permutation(tally: Tally, variant: Cell) -> Finding | None:
    """A metric with channels permuted against the same metric alone."""
    claim = perplexity_claim(tally, variant, variant.alone, PATTERN, MOST_PERMUTED)
    if claim is None:
        return None
    headline = f"{PATTERN}: {shown_variant(variant)} has {claim.first:.2f} times the perplexity of the metric alone"
    return Finding(claim.verdict, headline, f"{claim}. Target: at most {MOST_PERMUTED}.")


def weight_update(tally: Tally) -> Finding | None:
    """The weight update that comes nearest to the targets."""
    tried: list[tuple[Verdict, float, Cell, list[Claim]]] = []
    for variant in tally.recipes:
        if variant.recipe.update is None or variant.minutes is not None:
            continue
        claims = [
            perplexity_claim(tally, variant, WANDA, PATTERN, MOST_OF_WANDA),
            perplexity_claim(tally, variant, SPARSEGPT, PATTERN, MOST_OF_SPARSEGPT),
            time_claim(tally, variant, SPARSEGPT, PATTERN),
        ]
        made = [claim for claim in claims if claim is not None]
        if len(made) == len(claims):
            tried.append((worst(claim.verdict for claim in made), made[0].first, variant, made))
    if not tried:
        return None
    verdict, _, variant, (wanda, sparsegpt, time) = min(tried, key=lambda entry: (FROM_BEST.index(entry[0]), entry[1]))
    headline = (
        f"{PATTERN}: {shown_variant(variant)} has {wanda.first:.2f} times Wanda's perplexity and {sparsegpt.first:.2f} "
        f"times SparseGPT's, in {time.first:.2f} times SparseGPT's time"
    )
    text = (
        f"Over Wanda's: {wanda}. Over SparseGPT's: {sparsegpt}; {time}. The best of {len(tried)} recipes. Target: at "
        f"most {MOST_OF_WANDA} and {MOST_OF_SPARSEGPT}, in no more time."
    )
    return Finding(verdict, headline, text)


def recovery(tally: Tally, minutes: float) -> Finding | None:
    """The best recipe with so many minutes of recovery."""
    claims = [
        (claim, variant)
        for variant in tally.recipes
        if variant.minutes == minutes
        and (claim := perplexity_claim(tally, variant, WANDA, PATTERN, MOST_RECOVERED[minutes])) is not None
    ]
    if not claims:
        return None
    claim, variant = min(claims, key=lambda entry: (FROM_BEST.index(entry[0].verdict), entry[0].first))
    costs = [found.recovery for found in tally.select(variant, PATTERN) if found.recovery is not None]
    threads = sorted({found.threads for found in tally.select(variant, PATTERN)})
    steps = sum(cost.steps for cost in costs) / len(costs)
    headline = f"{PATTERN}: {shown_variant(variant)} has {claim.first:.2f} times Wanda's perplexity"
    text = (
        f"{claim}. {steps:.0f} steps of {costs[0].tokens // costs[0].steps:,} tokens on "
        f"{listed([str(count) for count in threads])} thread{'s' if threads != [1] else ''}. "
        f"Target: at most {MOST_RECOVERED[minutes]}, on two cores."
    )
    return Finding(claim.verdict, headline, text)


def dominance(tally: Tally) -> Finding | None:
    """Whether for each published form a recipe of this package is as good and takes no more time."""
    published = [v for v in tally.recipes if v.published and tally.select(v, PATTERN)]
    ours = [v for v in tally.everything if not v.published and tally.select(v, PATTERN)]
    verdicts, parts = [], []
    for rival in published:
        tried: list[tuple[Verdict, float, Cell, Claim, Claim]] = []
        for variant in ours:
            quality = perplexity_claim(tally, variant, rival, PATTERN, 1.0)
            time = time_claim(tally, variant, rival, PATTERN)
            if quality is not None and time is not None:
                tried.append((worst([quality.verdict, time.verdict]), quality.first, variant, quality, time))
        if tried:
            nearest = min(tried, key=lambda entry: (FROM_BEST.index(entry[0]), entry[4].first > 1, entry[1]))
            verdict, _, variant, quality, time = nearest
            verdicts.append(verdict)
            parts.append(f"{shown_variant(rival)}: {shown_variant(variant)} has {quality} times its perplexity, {time}")
    if not verdicts:
        return None
    overall = worst(verdicts)
    headline = {
        "holds": "for every published form, a recipe of this package is as good and takes no more time",
        "open": "it is open whether a recipe of this package is as good as every published form in no more time",
        "fails": "for some published form, no recipe of this package is as good and takes no more time",
    }[overall]
    return Finding(overall, f"{PATTERN}: {headline}", f"{'. '.join(parts)}.")


def _ratio(comparison: Comparison) -> str:
    ratio = 1 + comparison.change
    return f"{ratio:.3f}" if math.isnan(comparison.error) else f"{ratio:.3f} ± {ratio * comparison.error:.3f}"
