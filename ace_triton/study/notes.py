"""Sentences that a study's page puts beside its figures."""

from __future__ import annotations

from ..methods.registry import metric
from .norms import NEAR_POLE
from .tally import Tally, listed, shown_sparsity, shown_variant


def longer_calibration(tally: Tally) -> str | None:
    """Change of perplexity from the shortest to the longest calibration sequences; None with a single length."""
    if len(tally.lengths) < 2:
        return None
    short, long = tally.lengths[0], tally.lengths[-1]
    parts = []
    for sparsity in tally.sparsities:
        changes = []
        for variant in tally.calibrated:
            first, last = (tally.perplexity(variant, sparsity, length) for length in (short, long))
            if first is not None and last is not None:
                changes.append(f"{shown_variant(variant)} {last.mean / first.mean - 1:+.0%}")
        if changes:
            parts.append(f"at {shown_sparsity(sparsity)} {', '.join(changes)}")
    return f"Change of perplexity from L={short} to L={long:,}: {'; '.join(parts)}." if parts else None


def nearest_text(tally: Tally) -> str | None:
    """Which recipe's next-token distributions are nearest to the dense model's; None with fewer than two."""
    parts = []
    for sparsity in tally.sparsities:
        far = [(s.cell.variant, s.divergence) for s in tally.samples(sparsity) if s.cell and s.divergence]
        if len(far) > 1:
            variant, least = min(far, key=lambda pair: pair[1].mean)
            parts.append(
                f"at {shown_sparsity(sparsity)} {shown_variant(variant)} (mean KL {least.mean:.2f} nats, the same top "
                f"token at {least.agreement:.0%} of {least.tokens:,} positions)"
            )
    return f"Nearest to the dense model, by one seed: {listed(parts)}." if parts else None


def poles(tally: Tally) -> str | None:
    """How often VarP comes near its pole, for every normalizer; None if norms were not collected."""
    norms = tally.results.norms
    if norms is None or not norms.inputs:
        return None
    parts = []
    for place, pole in enumerate(norms.inputs[0].poles):
        near = sum(entry.poles[place].channels > 0 for entry in norms.inputs)
        largest = max(entry.poles[place].largest for entry in norms.inputs)
        parts.append(f"{pole.norm} {near} of {len(norms.inputs)} (largest f {largest:,.0f})")
    return (
        f"Inputs with a channel whose f is {NEAR_POLE:g} or more: {'; '.join(parts)}. The default normalizer is "
        f"{metric('varp').options['norm']}."
    )
