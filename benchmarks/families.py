"""Which families of transformers' causal decoders are pruned: a small random model of each; writes docs/families.md.

    python -m benchmarks.families

A family counts as pruned where every layer of its report has at most two of every four weights left and the model
still gives finite logits. Configurations are transformers' own with small sizes in place; a family that a few sets of
small sizes do not suit is named and not judged.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ace_triton import prune_model
from ace_triton.prune import linear_weight

WIDTH = dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 32)
INNER = dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 64)
DEPTH = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2)
HEADS = dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4)
LATENT = dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16) | dict.fromkeys(
    ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8
)
EXPERTS = (
    dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16)
    | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
)
RECURRENT = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "mamba_d_head"), 8) | {
    "state_size": 8,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
}
TEXT = {"vocab_size": 101, "max_position_embeddings": 64, "n_positions": 64, "sliding_window": 8}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {**WIDTH, **INNER, **DEPTH, **HEADS, **LATENT, **EXPERTS, **RECURRENT, **TEXT, **TOKENS}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8}

DEEP = dict.fromkeys(DEPTH, 8) | {"attn_layer_period": 2, "attn_layer_offset": 1}
TRIED: tuple[tuple[frozenset[str], dict[str, int]], ...] = (
    (frozenset(), {}),
    (frozenset({"head_dim"}), {}),
    (frozenset(), DEEP),
    (frozenset({"head_dim"}), DEEP),
    (frozenset({"head_dim", "num_key_value_heads", *HEADS}), {}),
    (frozenset({"head_dim", *LATENT}), {}),
)
"""Sets of small sizes, one tried after the other: what is left as the family has it, and what is changed."""

MOST_PARAMETERS = 60_000_000

console = Console()


@dataclass(frozen=True)
class Family:
    """What became of one.

    Attributes:
        name: of the family.
        layers: pruned.
        dense: why others stayed dense.
        whole: whether the whole model was run for each block.
        error: what stopped it.
    """

    name: str
    layers: int = 0
    dense: tuple[str, ...] = ()
    whole: bool = False
    error: str | None = None


def small_model(name: str, ids: torch.Tensor) -> PreTrainedModel | None:
    """A small random model that runs on ``ids`` [n_sequences, length]; None where no set of sizes makes one."""
    for kept, changed in TRIED:
        try:
            known = AutoConfig.for_model(name)
            sizes = {k: v for k, v in {**SMALL, **changed}.items() if k not in kept and hasattr(known, k)}
            config = AutoConfig.for_model(name, **sizes)
            with torch.device("meta"):
                parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if parameters > MOST_PARAMETERS:
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
        except Exception:
            continue
        return model
    return None


def judged(name: str, model: PreTrainedModel, ids: torch.Tensor, options: dict[str, Any]) -> Family:
    """Prune the model, and look at what is left of it."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = prune_model(model, ids, batch_size=4, **options)
        with torch.no_grad():
            finite = bool(model(input_ids=ids, use_cache=False).logits.isfinite().all())
        wrong = [layer.name for layer in report.layers if not _two_of_four(model, layer.name, layer.axis)]
        error = None if finite and not wrong else f"not finite, or not 2:4: {wrong}"
    except Exception as problem:
        return Family(name, error=f"{type(problem).__name__}: {problem}")
    whole = any("the whole model is run" in str(warning.message) for warning in caught)
    dense = {re.sub(r"tied to .*", "tied to another layer's", skipped.reason) for skipped in report.skipped}
    return Family(name, len(report.layers), tuple(sorted(dense)), whole, error)


def _two_of_four(model: PreTrainedModel, name: str, axis: str) -> bool:
    """Of a layer that is a module; experts of a stack are none and pass."""
    module = dict(model.named_modules()).get(name)
    weight = None if module is None else linear_weight(module)
    if weight is None:
        return True
    along = weight if axis == "in" else weight.t()
    return bool(((along.reshape(len(along), -1, 4) != 0).sum(-1) <= 2).all())


def page(families: Sequence[Family], not_made: Sequence[str], options: dict[str, Any]) -> Iterator[str]:
    """The document."""
    asked = ", ".join(f"{key}={value!r}" for key, value in options.items())
    pruned = [family for family in families if family.error is None]
    yield "# Families\n"
    yield (
        f"Written by `make families`: a small random model of every family of causal decoders in transformers "
        f"{transformers.__version__}, pruned on random tokens by `prune_model(model, ids, {asked})`. Counted as "
        "pruned: at most two of every four weights left in every layer of the report, and finite logits. A real "
        "checkpoint may still differ from a small one.\n"
    )
    yield _line("Pruned, block by block", [f for f in pruned if not f.whole])
    yield _line("Pruned, the whole model run for each block", [f for f in pruned if f.whole])
    yield _line("Not pruned", [f for f in families if f.error is not None])
    yield f"- **Not judged** ({len(not_made)}), since no set of small sizes suits them: {', '.join(not_made)}.\n"
    for family in families:
        if family.error is not None:
            yield f"{family.name}: {family.error}\n"
    yield "| left dense in places because | families |"
    yield "|---|---|"
    for reason in sorted({reason for family in pruned for reason in family.dense}):
        yield f"| {reason} | {', '.join(f.name for f in pruned if reason in f.dense)} |"


def _line(what: str, families: Sequence[Family]) -> str:
    return f"- **{what}** ({len(families)}): {', '.join(family.name for family in families) or 'none'}."


def main(
    only: Annotated[list[str] | None, typer.Option(help="Families to try; all where none is named.")] = None,
    method: Annotated[str, typer.Option()] = "ace",
    output: Annotated[Path, typer.Option()] = Path("docs/families.md"),
) -> None:
    """Try every family; write the document."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    ids = torch.randint(3, 101, (6, 16), generator=torch.Generator().manual_seed(1))
    options = {"method": method, "sparsity": "2:4", "permute": True, "update": "rescale"}
    families, not_made = [], []
    for name in track(only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "families", console=console):
        model = small_model(name, ids)
        if model is None:
            not_made.append(name)
        else:
            families.append(judged(name, model, ids, options))
    text = "\n".join(page(families, not_made, options))
    output.write_text(f"{text}\n", encoding="utf-8")
    console.print(f"{sum(f.error is None for f in families)} of {len(families)} pruned; written to {output}")


if __name__ == "__main__":
    typer.run(main)
