"""``ace-triton generate``."""

from __future__ import annotations

import sys
from typing import Annotated

import torch
import typer

from .. import report
from ..generation import generate as continue_prompt
from ..packed_checkpoint import load_model
from ..progress import stage
from .console import errors, progress_bars
from .options import DeviceOption, DtypeOption, JsonOption, TrustOption, check_json, parse_device, parse_dtype


def generate(
    model_dir: Annotated[
        str, typer.Argument(metavar="DIR", help="Checkpoint folder, dense or packed, hub name, .gguf file or smollm2.")
    ],
    prompt: Annotated[str, typer.Option(help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message; use the chat template.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    json: JsonOption = None,
) -> None:
    """Continue a prompt with a model; the text goes to stdout, tokens per second to stderr."""
    check_json(json)
    with progress_bars() as progress, stage(progress, "load the model"):
        model, tokenizer = load_model(
            model_dir, dtype=parse_dtype(dtype), device=parse_device(device), trust_remote_code=trust_remote_code
        )
    torch.manual_seed(seed)
    result = continue_prompt(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat=chat,
        write=_write,
    )
    print(flush=True)
    if json:
        report.write_json(json, result.to_dict())
    errors.print(
        f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} a second; "
        f"{result.prompt_tokens} tokens of prompt in {result.prompt_seconds:.2f} s",
        highlight=False,
    )


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
