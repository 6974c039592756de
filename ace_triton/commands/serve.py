"""``ace-triton serve``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from ..decoding.refusal import StepRefusedError
from ..decoding.several_texts import pays_in_step
from ..decoding.step import why_not_compiled
from ..errors import ArgumentError
from ..formats.registry import load_model
from ..progress import stage
from ..provenance import name_of
from .console import print_backend, print_note, progress_bars
from .options import (
    AnyModelArgument,
    DecoderOption,
    DeviceOption,
    DtypeOption,
    FuseOption,
    InputBitsOption,
    TrustOption,
    check_decoder,
    choose_input_bits,
    number,
    parse_device,
    parse_dtype,
)
from .sources import TAKEN, check_causal, check_source
from .sources import fuse as fuse_packed

PACKAGES = ("starlette", "uvicorn")


def serve(
    model_dir: AnyModelArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Others than loopback are reachable from outside, without a key.")
    ] = "127.0.0.1",
    port: Annotated[int, number("Port to listen on; 0 lets the system choose.", least=0, most=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Model name in the API.", show_default="name of the folder")] = None,
    max_tokens: Annotated[int, number("Largest number of new tokens of a request.", least=1)] = 1024,
    max_prompt: Annotated[
        int | None,
        number("Largest number of tokens of a prompt.", least=1, show_default="what the model allows"),
    ] = None,
    batch: Annotated[
        int,
        number(
            "Largest number of requests that run at the same time, as one batch; 1 runs each alone.",
            least=1,
        ),
    ] = 8,
    queue: Annotated[
        int, number("Number of requests that may wait while others run; more are refused (429).", least=0)
    ] = 64,
    max_body: Annotated[int, number("Largest size of a request, in bytes.", least=1)] = 2**20,
    grace: Annotated[
        float, number("Time that running requests have at shutdown, in seconds.", least=0, most=3600)
    ] = 10.0,
    decoder: DecoderOption = "auto",
    input_bits: InputBitsOption = None,
    fuse: FuseOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Serve a model over HTTP, with the routes of OpenAI's API: /v1/models, /v1/completions, /v1/chat/completions.

    Ctrl-C or SIGTERM shuts it down: requests that wait get an error, those that run may end.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise ArgumentError(f"serve needs {' and '.join(missing)}: pip install 'ace-triton[serve]'")
    from ..serving.server import Server, check_can_listen

    check_decoder(decoder)
    choose_input_bits(input_bits)
    weights_dtype, where = parse_dtype(dtype), parse_device(device)
    check_source(model_dir, any_format=True)
    check_causal(model_dir, "serve", TAKEN, trust_remote_code=trust_remote_code)
    check_can_listen(host, port)
    print_backend(where)
    with progress_bars() as progress, stage(progress, "load the model"):
        model, tokenizer = load_model(model_dir, dtype=weights_dtype, device=where, trust_remote_code=trust_remote_code)
    if fuse:
        fuse_packed(model, model_dir)
    if decoder != "transformers":
        refusal = why_not_compiled(model)
        if refusal is not None and decoder == "compiled":
            raise StepRefusedError(refusal)
        if refusal is None and decoder == "auto" and batch > 1:
            decoder = "compiled" if pays_in_step(model) else "transformers"
        as_batch = ", one token of each request in one call" if batch > 1 else ""
        if refusal is not None:
            decoder = "transformers"
            print_note(f"decoding with transformers: {refusal}")
        elif decoder == "transformers":
            print_note(
                "decoding with transformers as one batch: for dense weights in "
                f"{str(model.dtype).removeprefix('torch.')} that is faster than the compiled step here"
            )
        else:
            print_note(f"decoding with the compiled step{as_batch}")
    from ..serving.app import build_app
    from ..serving.engine import Engine

    engine = Engine(
        model,
        tokenizer,
        waiting=queue,
        most_tokens=max_tokens,
        longest_prompt=max_prompt,
        batch=batch,
        decoder=decoder,
    )
    app = build_app(engine, name or name_of(model_dir), most_bytes=max_body)
    shown = f"[{host}]" if ":" in host else host

    def ready(listening: int) -> None:
        print_note(f"serving {name or name_of(model_dir)} at http://{shown}:{listening}/v1; Ctrl-C stops it")

    Server(app, engine, host=host, port=port, grace=grace, ready=ready).serve_until_stopped()
    print_note("stopped")
