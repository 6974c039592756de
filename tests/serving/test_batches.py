"""Requests that are decoded as one batch: each gets what it gets alone."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from ace_triton import pack_model, prune_model
from ace_triton.decoding.step import step_together
from ace_triton.generation import generate

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from ace_triton.serving import joint  # noqa: E402
from tests.serving.waiting import COMPLETE, PATIENCE, until  # noqa: E402


@pytest.fixture
def rows(model):
    """Number of rows in each call of the head."""
    found = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].shape[0]))
    yield found
    hook.remove()


@pytest.mark.parametrize("temperature", [0, 1])
def test_requests_in_one_batch_get_what_each_gets_alone(start, gate, rows, temperature):
    """Prompts and answers of different lengths, more of them than rows, so requests join and leave between tokens."""
    bodies = [
        {"prompt": "x" * (1 + 5 * index), "max_tokens": 4 + 3 * index, "temperature": temperature, "seed": index}
        for index in range(8)
    ]

    def ask(url, body):
        return httpx.post(url + COMPLETE, json=body, timeout=PATIENCE).json()["choices"][0]["text"]

    gate.set()
    with start() as (url, _, _):
        alone = [ask(url, body) for body in bodies]
    assert set(rows) == {1}
    gate.clear()
    with start(batch=3) as (url, engine, _), ThreadPoolExecutor(8) as clients:
        together = [clients.submit(ask, url, body) for body in bodies]
        until(lambda: len(engine._jobs) == 8)
        gate.set()
        assert [task.result() for task in together] == alone
        assert engine.idle
    assert max(rows) == 3


@contextmanager
def together(engine, count):
    """A context whose requests begin to run once there are this many."""
    with engine._joint.member():
        yield
        until(lambda: len(engine._jobs) == count)


@pytest.fixture
def texts(monkeypatch):
    """Number of texts in each call of the compiled step for several requests."""
    found = []

    def counted(steps, tokens):
        found.append(len(steps))
        return step_together(steps, tokens)

    monkeypatch.setattr(joint, "step_together", counted)
    return found


@pytest.mark.parametrize("options", [{}, {"bits": 8, "group": 32}])
def test_requests_in_one_compiled_step_get_what_each_gets_alone(start, model, texts, options):
    """More requests than rows, which end at different times, so that others join between tokens."""
    packed = None
    if options:
        packed = copy.deepcopy(model)
        prune_model(packed, None, "magnitude", "2:4")
        pack_model(packed, **options)
    bodies = [
        {"prompt": "x" * (1 + 5 * k), "max_tokens": 4 + 5 * (5 - k), "temperature": k % 2, "seed": k} for k in range(6)
    ]

    def ask(url, body):
        return httpx.post(url + COMPLETE, json=body, timeout=PATIENCE).json()["choices"][0]["text"]

    with start(decoder="compiled", of=packed) as (url, _, _):
        alone = [ask(url, body) for body in bodies]
    assert not texts
    with start(batch=3, decoder="compiled", of=packed) as (url, engine, _), ThreadPoolExecutor(6) as clients:
        with together(engine, 6):
            tasks = [clients.submit(ask, url, body) for body in bodies]
        assert [task.result() for task in tasks] == alone
        assert engine.idle
    assert max(texts) == 3
    assert sum(texts) == sum(body["max_tokens"] - 1 for body in bodies)


def test_a_text_that_the_step_refuses_is_decoded_beside_others(start, texts):
    """One text is longer than the window, so transformers decodes it."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    windowed = MistralForCausalLM(MistralConfig(vocab_size=258, num_hidden_layers=2, sliding_window=24, **sizes)).eval()
    windowed.generation_config.eos_token_id = None
    bodies = [{"prompt": "a", "max_tokens": most, "temperature": 0} for most in (20, 30)]

    def ask(url, body):
        return httpx.post(url + COMPLETE, json=body, timeout=PATIENCE).json()["choices"][0]["text"]

    with start(decoder="transformers", of=windowed) as (url, _, _):
        alone = [ask(url, body) for body in bodies]
    with start(batch=2, decoder="compiled", of=windowed) as (url, engine, _), ThreadPoolExecutor(2) as clients:
        with together(engine, 2):
            tasks = [clients.submit(ask, url, body) for body in bodies]
        assert [task.result() for task in tasks] == alone
    assert texts == [1] * 19


def test_a_client_that_goes_leaves_the_compiled_batch(start, model, chatting, texts):
    with start(batch=2, decoder="compiled") as (url, engine, _), ThreadPoolExecutor(1) as clients:
        with together(engine, 2):
            other = clients.submit(
                httpx.post, url + COMPLETE, json={"prompt": "b", "max_tokens": 30, "temperature": 0}, timeout=PATIENCE
            )
            with httpx.stream("POST", url + COMPLETE, json={"prompt": "a", "max_tokens": 60, "stream": True}):
                until(lambda: len(engine._jobs) == 2)
        assert other.result().json()["choices"][0]["text"] == generate(model, chatting, "b", max_new_tokens=30).text
        until(lambda: engine.idle)
    assert sum(texts) < 29 + 59


def test_in_the_compiled_step_a_stop_text_ends_at_its_own_token(client, start):
    body = {"prompt": "a fox", "max_tokens": 12, "temperature": 0}
    text = client.completions.create(model="tiny", **body).choices[0].text
    body["stop"] = text[2:4]
    with start(batch=2, decoder="compiled") as (url, _, _):
        found = httpx.post(url + COMPLETE, json=body, timeout=PATIENCE).json()
    with start(decoder="transformers") as (url, _, _):
        expected = httpx.post(url + COMPLETE, json=body, timeout=PATIENCE).json()
    assert found["choices"] == expected["choices"]
    assert found["usage"]["completion_tokens"] <= expected["usage"]["completion_tokens"] < 12
    assert found["choices"][0]["finish_reason"] == "stop"


def test_an_error_in_a_batch_ends_its_requests_and_no_other(start, gate, model, capsys):
    def fails(_, inputs):
        if inputs[0].shape[0] > 1:
            raise ZeroDivisionError

    body = {"prompt": "a", "max_tokens": 20}
    with start(batch=2) as (url, engine, _), ThreadPoolExecutor(2) as clients:
        hook = model.lm_head.register_forward_pre_hook(fails)
        try:
            two = [clients.submit(httpx.post, url + COMPLETE, json=body, timeout=PATIENCE) for _ in range(2)]
            until(lambda: len(engine._jobs) == 2)
            gate.set()
            found = [task.result() for task in two]
        finally:
            hook.remove()
        assert {answer.status_code for answer in found} == {500}
        assert "ZeroDivisionError" in capsys.readouterr().err
        until(lambda: engine.idle)
        assert httpx.post(url + COMPLETE, json=body).status_code == 200


def test_a_client_that_goes_leaves_the_batch(start, gate, model, chatting):
    with start(batch=2) as (url, engine, _), ThreadPoolExecutor(1) as clients:
        body = {"prompt": "stays", "max_tokens": 30, "temperature": 0}
        stays = clients.submit(httpx.post, url + COMPLETE, json=body, timeout=PATIENCE)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + COMPLETE, json={"prompt": "goes", "max_tokens": 60}, timeout=0.3)
        until(lambda: any(job.ended for job in engine._jobs.values()))
        gate.set()
        text = stays.result().json()["choices"][0]["text"]
        assert text == generate(model, chatting, "stays", max_new_tokens=30).text
        until(lambda: engine.idle)
