"""A tiny model, its server in a thread, and clients."""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch

from tests.serving.waiting import PATIENCE


@pytest.fixture(scope="module")
def model():
    """A tiny Llama that never ends a text by itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=258, num_hidden_layers=2, max_position_embeddings=128, **sizes)
    made = LlamaForCausalLM(config).eval()
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture(scope="module")
def chatting(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    return own


@pytest.fixture(scope="module")
def start(model, chatting):
    """start(**options of the engine): a running server, as a context that gives its address and its engine.

    ``of`` is another model than the tiny one.
    """
    from ace_triton.serving.app import build_app
    from ace_triton.serving.engine import Engine
    from ace_triton.serving.server import Server

    @contextmanager
    def running(waiting=64, most_tokens=64, grace=10.0, most_bytes=4096, of=None, **options):
        engine = Engine(model if of is None else of, chatting, waiting=waiting, most_tokens=most_tokens, **options)
        listening = threading.Event()
        ports = []
        server = Server(
            build_app(engine, "tiny", most_bytes=most_bytes),
            engine,
            host="127.0.0.1",
            port=0,
            grace=grace,
            ready=lambda port: (ports.append(port), listening.set()),
        )
        thread = threading.Thread(target=server.serve_until_stopped)
        thread.start()
        assert listening.wait(PATIENCE)
        try:
            yield f"http://127.0.0.1:{ports[0]}", engine, server
        finally:
            server.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive()

    return running


@pytest.fixture(scope="module")
def url(start):
    with start() as (url, _, _):
        yield url


@pytest.fixture
def client(url):
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def gate(model):
    """Closed, the model's forward waits."""
    event = threading.Event()
    hook = model.register_forward_pre_hook(lambda *_: event.wait(PATIENCE) and None)
    yield event
    event.set()
    hook.remove()
