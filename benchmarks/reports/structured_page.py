"""The page of :mod:`benchmarks.reports.structured`: docs/structured.md from its record."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

RATIOS = (0.2, 0.1, 0.3)
"""Shares of the blocks' parameters to remove, in order of measurement."""

SAMPLES, LENGTH, WINDOW_LENGTH = 64, 128, 512

OWN = ("SAAP", "lstsq")
"""Method and update that are compared with all baselines."""

PUBLISHED_FLAP = ("FLAP", "bias")

AIM = 0.9
"""Share of the promised rise of speed that a smaller model should reach."""

_ALONE = ("SAAP, vectors alone", "SAAP, elements alone")
PARTS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("fusion, one scale a structure", "SAAP", _ALONE, "none"),
    ("fusion, one scale an importance", "SAAP, one scale an importance", _ALONE, "none"),
    ("fusion, learned scales", "SAAP, learned scales", _ALONE, "none"),
    (
        "fusion, of gradients",
        "SAAP of gradients",
        ("SAAP of gradients, vectors alone", "SAAP of gradients, elements alone"),
        "none",
    ),
    ("stability", "SAAP, stability on", ("SAAP",), "none"),
    ("uneven widths", "SAAP, uneven widths", ("SAAP",), "none"),
    ("stability, of gradients", "SAAP of gradients, stability on", ("SAAP of gradients",), "none"),
    ("group fine-tuning", "SAAP, then group fine-tuning", ("SAAP, then recovery",), "lstsq"),
)
"""A part of SAAP, the method with it, the methods without it, and the update of all."""

Values = dict[tuple[str, str], dict[int, float]]
"""Perplexity by method and update, and by seed."""


@dataclass(frozen=True)
class Speed:
    """Rates of a smaller model beside the dense one, in transformers, in tokens per CPU second on one thread.

    Attributes:
        prompt, dense_prompt: tokens of a prompt.
        decode, dense_decode: generated tokens, prompt left out.
        promised: weights that the dense model multiplies for a token, over those of the smaller one.
    """

    prompt: float
    dense_prompt: float
    decode: float
    dense_decode: float
    promised: float

    @property
    def gains(self) -> tuple[float, float]:
        """Rates of prompts and of generation over the dense model's."""
        return self.prompt / self.dense_prompt, self.decode / self.dense_decode

    @property
    def reached(self) -> tuple[float, float]:
        """The rises of both rates over the promised rise."""
        prompt, decode = ((gain - 1) / (self.promised - 1) for gain in self.gains)
        return prompt, decode


def page(record: Mapping[str, Any]) -> str:
    """docs/structured.md."""
    processors = sorted({dense["processor"] for dense in record["dense"].values()})
    lines = [
        "# Structured pruning: smaller dense models",
        "",
        f"Measured by `make structured` on a CPU ({', '.join(processors)}), in fp32 on one thread: {SAMPLES} x "
        f"{LENGTH} tokens of C4, windows of {WINDOW_LENGTH} tokens of WikiText-2. At least the ratio of the "
        "blocks' parameters is removed. Feed-forward widths stay multiples of 64, so a little more may go, as the "
        "table says. All methods keep every block equally wide; if a row says uneven widths, its width is the mean of "
        "the blocks. The number of key-value groups to remove is the one "
        "with the lowest loss on the calibration text. *Steps* are optimizer steps of 256 tokens of a recovery or a "
        "group fine-tuning. Seconds are CPU seconds of the whole run, without loading; the steps are part of them. "
        "With several calibration seeds, perplexities have their mean ± standard deviation (number of seeds). "
        "Rates are tokens per CPU second in transformers on one thread. *Promised* is the number of weights that a "
        "token is multiplied with in the dense model, over that in the smaller one.",
    ]
    for name, dense in record["dense"].items():
        results = [result for result in record["results"] if result["model"] == name]
        seeds = ", ".join(str(seed) for seed in sorted({result["seed"] for result in results}))
        lines += ["", f"## {name}", ""]
        lines += [f"Dense perplexity: {dense['perplexity']:.2f}, {dense['windows']} windows. Seeds: {seeds}.", ""]
        lines += _best(results, dense["perplexity"])
        lines += _methods(results, dense["perplexity"])
        lines += _parts(results)
        lines += _speeds(results)
    return "\n".join(lines) + "\n"


def _ratios(results: list[dict[str, Any]]) -> Iterator[tuple[float, list[dict[str, Any]]]]:
    """The results of each ratio, the smallest first."""
    for ratio in sorted({result["ratio"] for result in results}):
        yield ratio, [result for result in results if result["ratio"] == ratio]


def _values(results: list[dict[str, Any]]) -> Values:
    """The perplexities of results of one ratio."""
    found: Values = {}
    for result in results:
        found.setdefault((result["method"], result["update"]), {})[result["seed"]] = result["perplexity"]
    return found


def _best(results: list[dict[str, Any]], dense: float) -> list[str]:
    """Which method is best at each ratio, and where SAAP is among the baselines."""
    lines = []
    for ratio, found in _ratios(results):
        untrained = [result for result in found if not result["steps"]]
        values = _values(untrained)
        best = min(values, key=lambda key: fmean(values[key].values()))
        lines.append(
            f"- At {ratio:.0%}, without training, {_named(best)} is best: perplexity {_mean(values[best])}."
            f"{_beside_baselines(values)}{_beside_flap(untrained)}{_trained(found, dense)}"
        )
    return [*lines, ""]


def _beside_baselines(values: Values) -> str:
    """Whether SAAP with its update is below all baselines, as published and with the same update."""
    own, sentences = values.get(OWN), ""
    if own is None:
        return ""
    for form, chosen in (("as published", lambda update: update != OWN[1]), (f"with {OWN[1]}", lambda u: u == OWN[1])):
        rivals = {key: of for key, of in values.items() if not key[0].startswith(OWN[0]) and chosen(key[1])}
        if not rivals:
            continue
        nearest = min(rivals, key=lambda key: fmean(rivals[key].values()))
        below = [all(own[seed] < of.get(seed, fmean(of.values())) for of in rivals.values()) for seed in own]
        how = "is" if all(below) else "is not" if not any(below) else f"is in {sum(below)} of {len(below)} seeds"
        more = fmean(rivals[nearest].values()) / fmean(own.values()) - 1
        sentences += (
            f" {_named(OWN)} {how} below every baseline {form}: the best of {len(rivals)} is {nearest[0]}, "
            f"{_mean(rivals[nearest])} ({more:+.1%})."
        )
    return sentences


def _beside_flap(results: list[dict[str, Any]]) -> str:
    """The time of SAAP with its update over FLAP's."""
    seconds = [
        [result["seconds"] for result in results if (result["method"], result["update"]) == key]
        for key in (OWN, PUBLISHED_FLAP)
    ]
    if not all(seconds):
        return ""
    own, flap = (fmean(of) for of in seconds)
    return f" It takes {own / flap:.2f} times the CPU seconds of FLAP as published."


def _trained(results: list[dict[str, Any]], dense: float) -> str:
    """The best result with training."""
    trained = [result for result in results if result["steps"]]
    if not trained:
        return ""
    values = _values(trained)
    best = min(values, key=lambda key: fmean(values[key].values()))
    steps = next(result["steps"] for result in trained if result["method"] == best[0])
    over = fmean(values[best].values()) / dense
    return f" With training, {best[0]} is best: {_mean(values[best])} after {steps} steps, {over:.2f} times the dense."


def _named(key: tuple[str, str]) -> str:
    method, update = key
    return method if update == "none" else f"{method} with {update}"


def _mean(values: Mapping[int, float]) -> str:
    """The mean over seeds, with the standard deviation if there are several."""
    spread = f" ± {stdev(values.values()):.2f} ({len(values)})" if len(values) > 1 else ""
    return f"{fmean(values.values()):.2f}{spread}"


def _methods(results: list[dict[str, Any]], dense: float) -> list[str]:
    lines = [
        "| method | update | ratio | steps | removed | widths | CPU seconds | perplexity | over dense |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for ratio, found in _ratios(results):
        values = _values(found)
        for key in sorted(values, key=lambda key: fmean(values[key].values())):
            own = [result for result in found if (result["method"], result["update"]) == key]
            removed, seconds = (fmean(result[name] for result in own) for name in ("removed", "seconds"))
            widths = "; ".join(dict.fromkeys(_shown(result["widths"]) for result in own))
            lines.append(
                f"| {key[0]} | {key[1]} | {ratio:.0%} | {own[0]['steps']} | {removed:.1%} | {widths} | {seconds:.0f} | "
                f"{_mean(values[key])} | {fmean(values[key].values()) / dense:.2f}x |"
            )
    return lines


def _parts(results: list[dict[str, Any]]) -> list[str]:
    """What each part of SAAP brings; nothing before one of them is measured."""
    values = {ratio: _values(found) for ratio, found in _ratios(results)}
    rows = []
    for (part, method, others, update), ratio in itertools.product(PARTS, RATIOS):
        found = values.get(ratio, {})
        own, rivals = found.get((method, update)), [found.get((other, update), {}) for other in others]
        seeds = set(own or {}).intersection(*rivals)
        if not seeds:
            continue
        with_it = fmean((own or {})[seed] for seed in seeds)
        best = min(fmean(rival[seed] for seed in seeds) for rival in rivals)
        rows.append(f"| {part} | {ratio:.0%} | {len(seeds)} | {with_it:.2f} | {best:.2f} | {with_it / best - 1:+.1%} |")
    if not rows:
        return []
    return [
        "",
        "### What the parts of SAAP bring",
        "",
        "Perplexity with a part and without it. Without fusion is the better one of both importances. Without group "
        "fine-tuning is a recovery of the same number of steps. A change below zero is a gain.",
        "",
        "| part | ratio | seeds | with it | without it | change |",
        "|---|---:|---:|---:|---:|---:|",
        *rows,
    ]


def _speeds(results: list[dict[str, Any]]) -> list[str]:
    """Rates of each width beside the dense model's; nothing before one of them is measured."""
    timed = sorted((result for result in results if result["speed"]), key=lambda result: result["removed"])
    if not timed:
        return []
    speeds = [Speed(**result["speed"]) for result in timed]
    prompts, decodes = zip(*(speed.reached for speed in speeds), strict=True)
    counts = ", ".join(
        f"for {what} in {sum(share >= AIM for share in shares)} of {len(shares)} rows (median {median(shares):.2f})"
        for what, shares in (("prompts", prompts), ("generation", decodes))
    )
    lines = [
        "",
        "### Speed",
        "",
        "*Reached* is the share of the promised rise: (gain - 1) / (promised - 1). "
        f"The aim is {AIM}. It is reached {counts}.",
        "",
        "| widths | removed | prompt, tokens/s | dense | gain | reached "
        "| generated, tokens/s | dense | gain | reached | promised |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result, speed in zip(timed, speeds, strict=True):
        (gain, decode_gain), (reached, decode_reached) = speed.gains, speed.reached
        lines.append(
            f"| {_shown(result['widths'])} | {result['removed']:.1%} | {speed.prompt:.0f} | {speed.dense_prompt:.0f} | "
            f"{gain:.2f}x | {reached:.2f} | {speed.decode:.1f} | {speed.dense_decode:.1f} | {decode_gain:.2f}x | "
            f"{decode_reached:.2f} | {speed.promised:.2f}x |"
        )
    return lines


_KINDS = {
    "channels": "width",
    "groups": "groups",
    "experts": "experts",
    "expert_channels": "expert width",
    "blocks": "blocks",
}


def _shown(widths: Mapping[str, list[int]]) -> str:
    changed = [f"{_KINDS[kind]} {old} to {new}" for kind, (old, new) in widths.items() if old != new]
    return ", ".join(changed)
