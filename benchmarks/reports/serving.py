"""A thousand requests to ``ace-triton serve`` from several clients at once; writes docs/serving.{json,md}.

    python -m benchmarks.reports.serving --model packed

The server is a process of its own. The same requests go to a server that decodes with the compiled step and to one that
decodes with transformers; both decode requests that run at the same time as one batch. Every answer is compared with
the answer to the same request alone, and after the last one the server is ended by SIGTERM in the middle of a stream
and started again. Without ``--model`` a tiny random model is made and packed, so that the time is the server's own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

import ace_triton
from ace_triton.provenance import with_provenance

from ..harness.results import processor

DECODERS = {"compiled": "the compiled step", "transformers": "transformers"}

DISTINCT = 16
"""Different requests; each is sent many times."""

PATIENCE = 300


def main(
    model: Annotated[str | None, typer.Option(help="Model to serve; made if not given.")] = None,
    requests: Annotated[int, typer.Option()] = 1000,
    clients: Annotated[int, typer.Option()] = 8,
    max_tokens: Annotated[int, typer.Option(help="New tokens of a request.")] = 16,
    batch: Annotated[int, typer.Option(help="Requests that run at the same time.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder of serving.json and serving.md.")] = Path("docs"),
) -> None:
    """Send the requests, and write the page."""
    with tempfile.TemporaryDirectory() as place:
        source = model or made(Path(place))
        words = ["--batch", str(batch), "--decoder"]
        found = {decoder: measured(source, [*words, decoder], requests, clients, max_tokens) for decoder in DECODERS}
    content = {
        "model": "a tiny random Llama in 8 bits" if model is None else Path(model).name,
        "processor": processor(),
        "clients": clients,
        "batch": batch,
        "requests": requests,
        "max_tokens": max_tokens,
        "decoders": found,
    }
    (out / "serving.json").write_text(json.dumps(with_provenance(content), indent=2) + "\n")
    (out / "serving.md").write_text(page(content))


def measured(source: str, words: list[str], requests: int, clients: int, max_tokens: int) -> dict[str, Any]:
    """What a server answers, and how fast.

    Args:
        source: the model.
        words: options of the server.
        requests, clients, max_tokens: as for :func:`main`.
    """
    with server(source, words) as (address, _), httpx.Client(base_url=address, timeout=PATIENCE) as one:
        alone = [ask(one, index, max_tokens) for index in range(DISTINCT)]
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(lambda index: ask(one, index % DISTINCT, max_tokens), range(requests)))
        seconds = time.perf_counter() - start
    waits = sorted(answer["seconds"] for answer in answers)
    expected = [alone[index % DISTINCT] for index in range(requests)]
    return {
        "statuses": dict(Counter(str(answer["status"]) for answer in answers)),
        **{
            f"other_{what}_than_alone": sum(
                answer[what] != own[what] for answer, own in zip(answers, expected, strict=True)
            )
            for what in ("text", "tokens")
        },
        "tokens": sum(answer["tokens"] for answer in answers),
        "seconds": seconds,
        "median_seconds": statistics.median(waits),
        "slowest_seconds": waits[-1],
        "ended_by_sigterm": [killed(source, words) for _ in range(2)],
    }


def ask(client: httpx.Client, index: int, max_tokens: int) -> dict[str, Any]:
    """One of DISTINCT requests: a completion or a chat, whole or as a stream."""
    chat, stream = bool(index & 1), bool(index & 2)
    prompt = f"Request {index}: the quick brown fox"
    body: dict[str, Any] = {"max_tokens": max_tokens, "seed": index, "stream": stream}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    if stream:
        body["stream_options"] = {"include_usage": True}
    start = time.perf_counter()
    answer = client.post("/v1/chat/completions" if chat else "/v1/completions", json=body)
    taken = time.perf_counter() - start
    if stream:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        events = [json.loads(line) for line in lines if line != "[DONE]"]
        complete = lines[-1:] == ["[DONE]"] and answer.status_code == 200
    else:
        events, complete = [answer.json()], answer.status_code == 200
    text, tokens = "", 0
    for event in events:
        for choice in event.get("choices", ()):
            part = choice.get("message") or choice.get("delta") or choice
            text += part.get("content") or part.get("text") or ""
        tokens += (event.get("usage") or {}).get("completion_tokens", 0)
    return {"status": answer.status_code if complete else "cut", "text": text, "tokens": tokens, "seconds": taken}


@contextmanager
def server(model: str, options: list[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A running server: its address and its process."""
    words = [sys.executable, "-m", "ace_triton", "serve", model, "--port", "0", "--dtype", "float32", "--grace", "0"]
    words += options
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    assert process.stderr is not None
    try:
        address = None
        for line in process.stderr:
            if match := re.search(r"at (http://\S+)/v1", line):
                address = match[1]
                break
        assert address is not None, "the server did not start"
        yield address, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
        process.stderr.close()


def killed(model: str, options: list[str]) -> dict[str, Any]:
    """End a server in the middle of a stream: its exit code, and what the stream ended with."""
    with server(model, options) as (address, process):
        body = {"prompt": "a", "max_tokens": 1000, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=PATIENCE) as longest:
            if longest.status_code == 400:  # The model has fewer positions.
                body["max_tokens"] = 100
        lines: list[str] = []
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=PATIENCE) as stream:
            for line in stream.iter_lines():
                if not lines:
                    process.send_signal(signal.SIGTERM)
                if line:
                    lines.append(line.removeprefix("data: "))
        code = process.wait(PATIENCE)
    last = lines[-1]
    return {
        "exit_code": code,
        "last_event": last if last == "[DONE]" else json.loads(last).get("error", {}).get("message"),
    }


def made(folder: Path) -> str:
    """The folder of a tiny random Llama in 8 bits, with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{s: i + 2 for i, s in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    own.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=258, num_hidden_layers=2, max_position_embeddings=2048, eos_token_id=1, **sizes)
    made = LlamaForCausalLM(config)
    ace_triton.pack_model(made, all_bits=8, group=32)
    ace_triton.save_packed(made, own, folder / "tiny")
    return str(folder / "tiny")


def page(content: dict[str, Any]) -> str:
    columns = [_column(found) for found in content["decoders"].values()]
    rows = "\n".join(f"| {title} | {' | '.join(column[title] for column in columns)} |" for title in columns[0])
    return f"""# Serving under load

Measured by `make serving` on {content["processor"]}, with {content["model"]}: {content["requests"]:,} requests of
{content["clients"]} clients at once, half of them streams, half of them chats, of up to {content["max_tokens"]} tokens.
The server runs up to this many at the same time, as one batch: {content["batch"]}.

| decoded by | {" | ".join(DECODERS[decoder] for decoder in content["decoders"])} |
|---|{"---|" * len(columns)}
{rows}

The clients and other work share the processor with the server, so the times are upper bounds. In float32, texts of one
batch in transformers may part from those of the same requests alone at a near tie, because its products sum in another
order.
"""


def _column(found: dict[str, Any]) -> dict[str, str]:
    """The values of one decoder, by title."""
    stopped = found["ended_by_sigterm"]
    ends = "; ".join(f"exit code {end['exit_code']}, last event: {end['last_event']}" for end in stopped)
    return {
        "answers": ", ".join(f"{count} times {status}" for status, count in sorted(found["statuses"].items())),
        "other text than the same request alone": str(found["other_text_than_alone"]),
        "other number of tokens than alone": str(found["other_tokens_than_alone"]),
        "tokens": f"{found['tokens']:,} in {found['seconds']:.1f} s",
        "time to an answer": f"median {found['median_seconds']:.3f} s, slowest {found['slowest_seconds']:.3f} s",
        "SIGTERM in the middle of a stream, and again after a restart": ends,
    }


if __name__ == "__main__":
    typer.run(main)
