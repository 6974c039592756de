"""``ace-triton generate``."""

from __future__ import annotations

import sys
from textwrap import shorten
from typing import Annotated, Any

import torch
import typer

from ..batch_generation import BatchGeneration, generate_batch
from ..errors import GenerationError
from ..formats.registry import load_model
from ..generation import Generation
from ..generation import generate as continue_prompt
from ..inputs.companions import Companions
from ..progress import stage
from ..provenance import name_of, with_provenance
from . import report
from .console import print_backend, print_note, progress_bars
from .options import (
    LARGEST_SEED,
    AnyModelArgument,
    DecoderOption,
    DeviceOption,
    DtypeOption,
    FuseOption,
    InputBitsOption,
    JsonOption,
    TrustOption,
    check_decoder,
    check_json,
    choose_input_bits,
    number,
    parse_device,
    parse_dtype,
)
from .sources import TAKEN, check_causal, check_length, check_source
from .sources import fuse as fuse_packed

SHOWN_OF_A_PROMPT = 40
"""Largest number of characters of a prompt that are printed before its continuation, if there are several."""


def generate(
    model_dir: AnyModelArgument,
    prompt: Annotated[
        list[str],
        typer.Option(
            help="Text to continue; repeatable: several are continued together, as one batch, and each continuation is "
            "printed after the number and the beginning of its prompt."
        ),
    ],
    max_new_tokens: Annotated[int, number("Largest number of new tokens.", least=1)] = 128,
    temperature: Annotated[
        float, number("Sampling temperature; 0 takes the most likely token each time.", least=0)
    ] = 0.0,
    top_p: Annotated[
        float | None,
        number("Sample from the most likely tokens whose probabilities reach this sum.", above=0, most=1),
    ] = None,
    top_k: Annotated[int | None, number("Sample from this many of the most likely tokens.", least=1)] = None,
    seed: Annotated[int, number("Random seed of the sampling.", least=0, most=LARGEST_SEED)] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template, as a user's message.")
    ] = False,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the decoding step with torch.compile, which takes a minute or more at first."
        ),
    ] = False,
    decoder: DecoderOption = "auto",
    input_bits: InputBitsOption = None,
    fuse: FuseOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    json: JsonOption = None,
) -> None:
    """Continue a prompt, or several. Prints the text to stdout and its speed to stderr."""
    check_json(json)
    if compile and fuse:
        raise GenerationError("--compile and --fuse: give only one of them")
    check_decoder(decoder)
    choose_input_bits(input_bits)
    if compile and len(prompt) > 1:
        raise GenerationError("--compile continues one --prompt: leave out --compile, or give one prompt")
    if compile and decoder == "compiled":
        raise GenerationError("--compile and --decoder compiled: give only one of them")
    weights_dtype, where = parse_dtype(dtype), parse_device(device)
    check_source(model_dir, any_format=True)
    check_causal(model_dir, "generate", TAKEN, trust_remote_code=trust_remote_code)
    check_length(model_dir, max_new_tokens, "--max-new-tokens")
    print_backend(where)
    with progress_bars() as progress, stage(progress, "load the model"):
        model, tokenizer = load_model(model_dir, dtype=weights_dtype, device=where, trust_remote_code=trust_remote_code)
    if isinstance(tokenizer, Companions):
        raise GenerationError(f"{model_dir}: a {type(model).__name__} writes no text: only causal language models do")
    if fuse:
        fuse_packed(model, model_dir)
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "chat": chat,
        "decoder": decoder,
    }
    result: Generation | BatchGeneration
    if len(prompt) == 1:
        compiler = "inductor" if compile else None
        result = continue_prompt(model, tokenizer, prompt[0], compile=compiler, write=_write, **options)
        print(flush=True)
    else:
        result = generate_batch(model, tokenizer, prompt, **options)
        for place, (given, text) in enumerate(zip(prompt, result.texts, strict=True), start=1):
            print(f"[{place}: {shorten(given, SHOWN_OF_A_PROMPT, placeholder=' ...')}] {text}", flush=True)
    if json:
        facts = with_provenance(
            result.to_dict(),
            model=name_of(model_dir),
            prompt=prompt[0] if len(prompt) == 1 else prompt,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            chat=chat,
            compiled=compile,
            fused=fuse,
            input_bits=input_bits,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
        )
        report.write_json(json, facts)
    if isinstance(result, Generation):
        new_tokens, prompt_tokens = f"{result.new_tokens} new tokens", f"{result.prompt_tokens} tokens of prompt"
    else:
        new_tokens = f"{sum(result.new_tokens)} new tokens of {len(prompt)} texts"
        prompt_tokens = f"{sum(result.prompt_tokens)} tokens of prompts"
    print_note(
        f"{new_tokens}, {result.tokens_per_second:.1f} per second; {prompt_tokens} in {result.prompt_seconds:.2f} s; "
        f"decoded by {_decoder_of(result)}"
    )


def _decoder_of(result: Generation | BatchGeneration) -> str:
    if result.decoder == "compiled":
        return "the compiled step"
    return "transformers" if result.refusal is None else f"transformers, not by the compiled step: {result.refusal}"


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
