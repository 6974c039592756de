"""The server, as the openai client and bad clients see it."""

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ace_triton.generation import decode, generate
from tests.serving.waiting import CHAT, COMPLETE, PATIENCE, until

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


def test_a_completion_is_what_generate_gives(client, model, chatting):
    found = client.completions.create(model="tiny", prompt="a fox", max_tokens=12, temperature=0)
    expected = generate(model, chatting, "a fox", max_new_tokens=12)
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (5, 12, 17)
    ids = chatting("a fox").input_ids
    by_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=12, temperature=0)
    assert by_ids.choices[0].text == expected.text
    assert [entry.id for entry in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_stream_has_the_same_text_and_usage(client, model, chatting):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    options = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 10}
    whole = client.chat.completions.create(**options)
    *chunks, last = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert (
        whole.choices[0].message.content
        == generate(model, chatting, "system: be brief\nuser: hi\nassistant: ", max_new_tokens=10).text
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert last.usage == whole.usage
    assert last.choices == []


def test_eight_clients_at_once_get_what_each_gets_alone(client):
    def ask(index):
        options = {"model": "tiny", "prompt": f"client {index}", "max_tokens": 8, "seed": index}
        if index % 2:
            return client.completions.create(**options).choices[0].text
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))

    alone = [ask(index) for index in range(8)]
    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, range(8))) == alone
    assert len(set(alone)) == 8


def test_sampling_follows_the_seed_and_top_p(client):
    def ask(**options):
        return client.completions.create(model="tiny", prompt="x", max_tokens=16, **options).choices[0].text

    assert ask(seed=1) == ask(seed=1) != ask(seed=2)
    assert ask() != ask()
    assert ask(seed=1, top_p=0.0001) == ask(temperature=0)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
def test_a_tiny_temperature_takes_the_most_likely_token(client, temperature):
    one, other = (
        client.completions.create(model="tiny", prompt="x", max_tokens=8, temperature=value)
        for value in (temperature, 0)
    )
    assert one.choices[0].text == other.choices[0].text


def test_a_stop_text_ends_the_completion_before_it(client, model, chatting):
    whole = generate(model, chatting, "stop here", max_new_tokens=40).text
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    found = client.completions.create(
        model="tiny", prompt="stop here", max_tokens=40, temperature=0, stop=["%%%", stop]
    )
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 40


def test_the_end_token_ends_the_completion(client, model, chatting):
    tokens = decode(model, chatting, chatting("end").input_ids, max_new_tokens=6).tokens
    model.generation_config.eos_token_id = [tokens[3]]
    try:
        found = client.completions.create(model="tiny", prompt="end", max_tokens=6, temperature=0)
    finally:
        model.generation_config.eos_token_id = None
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == tokens.index(tokens[3]) + 1


BAD = [
    (COMPLETE, b"{", 400, None, "the body is not JSON"),
    (COMPLETE, b"[1]", 400, None, "must be a JSON object"),
    (COMPLETE, b"\xff", 400, None, "the body is not JSON"),
    (COMPLETE, {}, 400, "prompt", "prompt must be one text"),
    (COMPLETE, {"prompt": ["a", "b"]}, 400, "prompt", "prompt must be one text"),
    (COMPLETE, {"prompt": [1, 258]}, 400, "prompt", "token id 258, the model's vocabulary ends at 257"),
    (COMPLETE, {"prompt": [1, -3]}, 400, "prompt", "token id -3"),
    (COMPLETE, {"prompt": "a" * 128}, 400, "prompt", "more than the model's 128 positions"),
    (COMPLETE, {"prompt": "a", "max_tokens": 65}, 400, "max_tokens", "at most 64 on this server, got 65"),
    (COMPLETE, {"prompt": "a", "max_tokens": True}, 400, "max_tokens", "an integer from 1"),
    (COMPLETE, {"prompt": "a", "temperature": 3}, 400, "temperature", "from 0 to 2, got 3"),
    (COMPLETE, {"prompt": "a", "temperature": "hot"}, 400, "temperature", "a number, got 'hot'"),
    (COMPLETE, b'{"prompt": "a", "top_p": NaN}', 400, "top_p", "from 0 to 1, got nan"),
    (COMPLETE, {"prompt": "a", "temperature": 10**400}, 400, "temperature", "from 0 to 2, got 1000000"),
    (COMPLETE, {"prompt": "a", "top_p": 10**400}, 400, "top_p", "from 0 to 1, got 1000000"),
    (COMPLETE, b'{"prompt": "a", "top_p": -1e999}', 400, "top_p", "from 0 to 1, got -inf"),
    (COMPLETE, {"prompt": "a", "seed": 1.5}, 400, "seed", "an integer"),
    (COMPLETE, {"prompt": "a", "stop": [""]}, 400, "stop", "a text or up to 4 texts"),
    (COMPLETE, {"prompt": "a", "stream": "yes"}, 400, "stream", "true or false"),
    (COMPLETE, {"prompt": "a", "n": 2}, 400, "n", "n is not supported"),
    (COMPLETE, {"prompt": "a", "tempreature": 1}, 400, "tempreature", "unknown field 'tempreature'"),
    (COMPLETE, b'{"prompt": "\\ud800"}', 400, "prompt", "not valid Unicode"),
    (COMPLETE, b'{"prompt": "a", "\\ud800": 1}', 400, "\\ud800", "unknown field '\\ud800'"),
    (COMPLETE, {"prompt": "a", "model": "gpt"}, 404, "model", "this server has 'tiny'"),
    (COMPLETE, {"prompt": "a" * 5000}, 413, None, "more than 4096 bytes"),
    (CHAT, {"messages": []}, 400, "messages", "a list that is not empty"),
    (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages[0]", "a role, one of system"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0]", "type 'text'"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "tools", "tools is not supported"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "message"), BAD)
def test_a_bad_request_is_answered_with_openai_s_error(url, path, body, status, param, message):
    content = body if isinstance(body, bytes) else json.dumps(body)
    found = httpx.post(url + path, content=content, headers={"Content-Type": "application/json; charset=utf-8"})
    assert found.status_code == status
    error = found.json()["error"]
    assert message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_a_web_page_of_another_server_cannot_make_the_model_work(url):
    """Browsers send these types without asking, and ask before they send JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        found = httpx.post(url + COMPLETE, content=b'{"prompt": "a"}', headers={"Content-Type": kind})
        assert found.status_code == 415
        assert "must be application/json" in found.json()["error"]["message"]


def test_other_routes_and_methods_are_errors_too(url):
    assert httpx.get(url + "/v1/embeddings").status_code == 404
    found = httpx.get(url + COMPLETE)
    assert found.status_code == 405
    assert found.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(url + "/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert httpx.get(url + "/health").json() == {"status": "ok"}


def test_a_full_queue_refuses_and_then_accepts_again(start, gate):
    body = {"prompt": "a", "max_tokens": 2}
    with start(waiting=1, longest_prompt=3) as (url, engine, _), ThreadPoolExecutor(2) as clients:
        two = [clients.submit(httpx.post, url + COMPLETE, json=body, timeout=PATIENCE) for _ in range(2)]
        until(lambda: len(engine._jobs) == 2)
        refused = httpx.post(url + COMPLETE, json=body)
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        gate.set()
        assert [task.result().status_code for task in two] == [200, 200]
        assert httpx.post(url + COMPLETE, json=body).status_code == 200
        assert httpx.post(url + COMPLETE, json={"prompt": "abcd"}).json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_the_engine(start, gate, stream):
    with start(waiting=0) as (url, engine, _):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + COMPLETE, json={"prompt": "a", "stream": stream}, timeout=0.3)
        job = next(iter(engine._jobs.values()))
        until(lambda: job.ended)
        gate.set()
        until(lambda: engine.idle)
        assert httpx.post(url + COMPLETE, json={"prompt": "a"}).status_code == 200


def test_an_error_of_the_model_ends_one_request(url, model, capsys):
    hook = model.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        found = httpx.post(url + COMPLETE, json={"prompt": "a"})
    finally:
        hook.remove()
    assert found.status_code == 500
    assert found.json()["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert httpx.post(url + COMPLETE, json={"prompt": "a"}).status_code == 200


def test_at_shutdown_the_running_request_ends_and_those_that_wait_are_cut(start, gate):
    body = {"prompt": "a", "max_tokens": 5, "stream": True}
    with start() as (url, engine, server), ThreadPoolExecutor(2) as clients:
        first = clients.submit(httpx.post, url + COMPLETE, json=body, timeout=PATIENCE)
        until(lambda: engine._waiting.empty() and not engine.idle)
        second = clients.submit(httpx.post, url + COMPLETE, json=body, timeout=PATIENCE)
        until(lambda: len(engine._jobs) == 2)
        server.stop()
        assert '"the server is shutting down"' in second.result().text
        assert httpx.post(url + COMPLETE, json=body).status_code == 503
        gate.set()
        assert first.result().text.endswith("data: [DONE]\n\n")


def test_sigterm_ends_the_command_and_cuts_its_stream(command, tiny_checkpoint, tmp_path, monkeypatch):
    """The command in this thread, a client in another; the port is free again afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines = []

    def client():
        address = f"http://127.0.0.1:{port}"

        def answers():
            try:
                return httpx.get(address + "/health").status_code == 200
            except httpx.ConnectError:
                return False

        until(answers)
        body = {"prompt": "a", "max_tokens": 120, "stream": True}
        with httpx.stream("POST", address + COMPLETE, json=body, timeout=PATIENCE) as stream:
            for line in stream.iter_lines():
                if not lines:
                    os.kill(os.getpid(), signal.SIGTERM)
                    os.kill(os.getpid(), signal.SIGTERM)
                lines.append(line)

    thread = threading.Thread(target=client)
    thread.start()
    code, _, errors = command("serve", tiny_checkpoint, "--port", port, "--device", "cpu")
    thread.join(PATIENCE)
    assert code == 0, errors
    assert f"serving tiny at http://127.0.0.1:{port}/v1" in errors
    assert "load the model" in errors
    assert errors.endswith("stopped\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert events[-1].get("error", {}).get("message") == "the server is shutting down" or lines[-2] == "data: [DONE]"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))
        again.listen()
        code, _, errors = command("serve", tiny_checkpoint, "--port", port)
        assert code == 1
        assert f"cannot listen on 127.0.0.1:{port}: give another --port or --host" in errors
        assert "load the model" not in errors
