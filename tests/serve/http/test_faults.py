"""What goes wrong while texts are computed, or is given up: nothing leaks, and the others go on."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

import rrt
from rrt.errors import UserError
from rrt.serve import engine as engine_module
from rrt.serve import text as text_module
from rrt.serve.__main__ import _parse_arguments
from rrt.serve.http import worker as worker_module
from rrt.serve.http.server import listen, open_socket, running_server
from tests.util.servers import held_engine, serving, wait_until

COMPLETION = "/v1/completions"
ROOT = Path(__file__).resolve().parents[3]


def open_request(served, **body):
    """Send a request, and return the socket without waiting for an answer."""
    place, content = urlsplit(served.url), json.dumps(body).encode()
    connection = socket.create_connection((place.hostname, place.port), timeout=60)
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def test_a_client_that_goes_takes_its_texts_along(server):
    worker = server.service.worker
    with held_engine(server) as gate:
        connections = [
            open_request(server, prompt=[[1] * 9, [2] * 9], n=2, max_tokens=400, stream=stream)
            for stream in (False, True)
        ]
        wait_until(lambda: worker.num_open == 8)
        stays = threading.Thread(target=lambda: answers.append(server.complete(prompt="a", max_tokens=4)))
        answers = []
        stays.start()
        wait_until(lambda: worker.num_open == 9)
        for connection in connections:
            connection.close()
        wait_until(lambda: worker.num_open == 1)
        gate.set()
    stays.join(60)
    assert answers[0].status == 200
    server.wait_until_idle()
    assert b'rrt_http_responses_total{path="/v1/completions",status="499"} 2.0' in server.get("/metrics").body


def test_a_client_that_goes_within_a_stream_ends_it(server):
    before = server.service.metrics.new_tokens._value.get()
    connection = open_request(server, prompt=[1, 2], max_tokens=500, stream=True, ignore_eos=True)
    received = b""
    while b"data: " not in received:
        received += connection.recv(4096)
    connection.close()
    server.wait_until_idle()
    assert server.service.metrics.new_tokens._value.get() - before < 500


def test_more_than_may_wait_is_told_to_come_again(checkpoint):
    with serving(checkpoint, max_running=1, max_queue=2) as served:
        with held_engine(served) as gate, ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(served.complete, prompt="a", max_tokens=2) for _ in range(3)]
            wait_until(lambda: served.service.worker.num_open == 3)
            answer = served.complete(prompt="a", max_tokens=2)
            assert answer.status == 429 and answer.headers["retry-after"] == "1"
            assert answer.json["error"]["type"] == "rate_limit_error"
            assert served.complete(prompt="a", n=4, max_tokens=2).status == 400
            gate.set()
            assert [future.result().status for future in waiting] == [200] * 3
        assert served.complete(prompt="a", n=3, max_tokens=2).status == 200
        served.wait_until_idle()


def test_logits_that_are_not_finite_end_their_request_alone(server):
    decoder, logits, calls = server.service.worker.decoder, server.service.worker.decoder.logits, []

    def broken(x, loops=None):
        found = logits(x, loops).clone()
        if len(found) >= 3 and not calls:
            calls.append(1)
            found[1] = torch.nan
        return found

    body = {"max_tokens": 6, "temperature": 0}
    expected = server.complete(prompt=[[5], [6], [7]], **body).json["choices"]
    with ThreadPoolExecutor(3) as pool:
        try:
            with held_engine(server) as gate:
                futures = []
                for index in range(3):
                    # Not the one that fails: if it began before the others, its stream would have begun with 200.
                    futures.append(pool.submit(server.complete, prompt=[5 + index], stream=index == 0, **body))
                    wait_until(lambda index=index: server.service.worker.num_open == index + 1)
                decoder.logits = broken
                gate.set()
                answers = [future.result() for future in futures]
        finally:
            del decoder.logits
    assert sorted(answer.status for answer in answers) == [200, 200, 500]
    for answer, choice in zip(answers, expected, strict=True):
        if answer.status == 500:
            assert "found NaN or infinity" in answer.json["error"]["message"]
            assert answer.json["error"]["type"] == "server_error"
        elif answer.headers["content-type"] == "application/json":
            assert answer.json["choices"][0]["text"] == choice["text"]
    server.wait_until_idle()


def test_sampling_that_fails_ends_its_request_alone(server, monkeypatch):
    body = {"max_tokens": 6, "temperature": 1.0}
    expected = server.complete(prompt=[6], seed=2, **body).json["choices"][0]["text"]

    def broken(logits, sampling, step):
        if sampling.seed == 1 and step == 3:
            raise ValueError("a fault")
        return draw(logits, sampling, step)

    draw = engine_module.draw
    monkeypatch.setattr(engine_module, "draw", broken)
    with ThreadPoolExecutor(2) as pool, held_engine(server) as gate:
        bad = pool.submit(server.complete, prompt=[5], seed=1, **body)
        good = pool.submit(server.complete, prompt=[6], seed=2, **body)
        wait_until(lambda: server.service.worker.num_open == 2)
        gate.set()
        assert good.result().json["choices"][0]["text"] == expected
        assert bad.result().status == 500 and "a fault" not in bad.result().body.decode()
    server.wait_until_idle()


@pytest.mark.parametrize("error", [RuntimeError("a fault"), MemoryError()])
def test_a_pass_that_fails_ends_those_in_flight_and_the_server_goes_on(server, error):
    engine = server.service.worker._engine
    embed, calls = engine.decoder.embed, []

    def broken(tokens):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return embed(tokens)

    engine.decoder.embed = broken
    try:
        answer = server.complete(prompt=[[1, 2], [3]], max_tokens=20, temperature=0, ignore_eos=True)
        assert answer.status == 500 and "a fault" not in answer.body.decode()
        calls.clear()
        # A stream that has begun tells it in an event.
        answer = server.complete(prompt=[1, 2], max_tokens=20, temperature=0, ignore_eos=True, stream=True)
        assert answer.status == 200 and b"[DONE]" not in answer.body
        assert json.loads(answer.body.decode().split("data: ")[-1])["error"]["type"] == "server_error"
    finally:
        del engine.decoder.embed
    assert server.complete(prompt=[1, 2], max_tokens=2).status == 200
    server.wait_until_idle()


def test_an_engine_whose_passes_all_fail_is_not_healthy(checkpoint):
    with serving(checkpoint) as served:
        decoder = served.service.worker.decoder
        decoder.embed = lambda tokens: (_ for _ in ()).throw(RuntimeError("a fault that stays"))
        for _ in range(2):
            assert served.complete(prompt=[1, 2], max_tokens=4).status == 500
            assert served.get("/health").status == 200
        assert served.complete(prompt=[1, 2], max_tokens=4).status == 503
        assert served.get("/health").status == 503
        assert served.complete(prompt=[1, 2], max_tokens=4).status == 503


def test_a_prompt_whose_scoring_fails_ends_its_request_alone(server, monkeypatch):
    model = server.service.worker.decoder.model
    monkeypatch.setattr(model, "logits", lambda states: torch.full((len(states), 420), torch.nan))
    answer = server.complete(prompt="a b", echo=True, logprobs=1, max_tokens=1)
    assert answer.status == 500 and "found NaN or infinity" in answer.json["error"]["message"]
    monkeypatch.undo()
    assert server.complete(prompt="a b", echo=True, logprobs=1, max_tokens=1).status == 200


@pytest.mark.parametrize(("owner", "name"), [
    (worker_module, "choose_tokens"), (worker_module, "RequestText"), (text_module.RequestText, "push"),
])  # fmt: skip
@pytest.mark.parametrize("form", [{}, {"echo": True, "logprobs": 1}], ids=["plain", "scored"])
def test_an_unexpected_error_ends_its_request_alone(server, monkeypatch, owner, name, form):
    def broken(*args, **kwargs):
        raise ValueError("a fault")

    expected = 200 if name == "choose_tokens" and not form else 500
    monkeypatch.setattr(owner, name, broken)
    answer = server.complete(prompt="a b", max_tokens=1, temperature=1.0, **form)
    assert answer.status == expected and b"a fault" not in answer.body
    monkeypatch.undo()
    assert server.complete(prompt="a b", max_tokens=1, **form).status == 200
    server.wait_until_idle()


def test_an_engine_thread_that_ends_leaves_nobody_waiting(checkpoint):
    with serving(checkpoint) as served, ThreadPoolExecutor(2) as pool:
        worker = served.service.worker
        with held_engine(served) as gate:
            waiting = pool.submit(served.complete, prompt=[1], max_tokens=9)
            wait_until(lambda: worker.num_in_engine == 1)
            switch = pool.submit(served.post, "/rrt/policy", {"policy": "never"})
            wait_until(lambda: worker._next_policy is not None)
            worker._send = None
            gate.set()
            assert waiting.result().status == 503 and switch.result().status == 400
        assert served.complete(prompt=[1]).status == 503 and served.get("/health").status == 503
        assert served.post("/rrt/policy", {"policy": "never"}).status == 400


def test_what_comes_after_the_server_gave_up_is_refused(checkpoint):
    with serving(checkpoint) as served:
        served.service.worker.give_up()
        assert served.complete(prompt=[1]).status == 503


def test_a_second_server_at_an_address_is_refused():
    with open_socket("127.0.0.1", 0) as first, open_socket("127.0.0.1", first.getsockname()[1]) as second:
        listen(first)
        with pytest.raises(UserError, match="expected an address that is free"):
            listen(second)


def test_a_key_has_no_line_end(checkpoint, monkeypatch):
    monkeypatch.setenv("RRT_API_KEY", "secret\n")
    assert _parse_arguments(["--checkpoint", str(checkpoint)]).api_key == "secret"


def test_another_policy_waits_for_what_runs_and_what_comes_waits_for_it(checkpoint):
    with serving(checkpoint) as served, ThreadPoolExecutor(3) as pool:
        worker = served.service.worker
        body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
        with held_engine(served) as gate:
            first = pool.submit(served.complete, prompt=[1, 2], **body)
            wait_until(lambda: worker.num_in_engine == 1)
            switch = pool.submit(served.post, "/rrt/policy", {"policy": "static:0"})
            wait_until(lambda: worker._next_policy is not None)
            second = pool.submit(served.complete, prompt=[1, 2], **body)
            wait_until(lambda: worker.num_open == 2)
            again = served.post("/rrt/policy", {"policy": "never"})
            assert again.status == 400 and "another switch under way" in again.json["error"]["message"]
            gate.set()
            assert switch.result().json == {"policy": "static:0"}
        # The prompt's own token takes all loops.
        loops = [future.result().json["choices"][0]["rrt"]["exit_loops"] for future in (first, second)]
        assert loops == [[1] * 12, [1] + [0] * 11]
        assert served.get("/rrt/stats").json["policy"] == "static:0"
        served.wait_until_idle()


def test_a_policy_is_taken_from_this_machine_alone(server):
    def status(policy="verify", **headers):
        return server.post("/rrt/policy", {"policy": policy}, **headers).status

    assert status("auto") == status() == 200 and status("static:7") == status("other") == 400
    assert status(**{"X-Forwarded-For": "10.0.0.1"}) == 403
    assert status(Host="evil.example") == 403
    plain = server.send("POST", "/rrt/policy", b'{"policy": "never"}', {"Content-Type": "text/plain"})
    assert plain.status == 415
    assert server.get("/rrt/stats").json["policy"] == "verify"


@pytest.mark.parametrize(
    ("num_requests", "num_clients"), [(60, 12), pytest.param(1000, 64, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_load_of_many_clients_with_cancels_and_bad_requests(checkpoint, num_requests, num_clients):
    """Requests of mixed length, a tenth cancelled, a twentieth malformed: right texts, no page lost."""
    rng = random.Random(0)
    llm = rrt.LLM(checkpoint, dtype=torch.float64, device="cpu", cache_bytes=2**22)
    cases = []
    for _ in range(num_requests):
        params = {"max_tokens": rng.randint(1, 24), "seed": rng.randrange(99), "temperature": rng.choice([0, 0.8, 1.2])}
        prompt = [rng.randrange(420) for _ in range(rng.randint(1, 60))]
        cases.append((prompt, params, rng.choice(["whole", "stream", "stream", "scored"])))
    expected = llm.generate(
        [prompt for prompt, _, _ in cases],
        [rrt.SamplingParams(p["temperature"], 0, 1.0, p["seed"], p["max_tokens"]) for _, p, _ in cases],
    )
    kinds = ["cancel"] * (num_requests // 10) + ["malformed"] * (num_requests // 20)
    kinds += ["good"] * (num_requests - len(kinds))
    rng.shuffle(kinds)
    # So few pages that requests wait for them.
    with serving(checkpoint, cache_bytes=1_180_000, chunk_size=16) as served:

        def ask(index):
            (prompt, params, form), kind = cases[index], kinds[index]
            if kind == "malformed":
                broken = random.Random(index).choice([b"{", b'{"prompt": [999]}', b'{"prompt": "a", "n": "x"}'])
                assert served.post(COMPLETION, broken).status == 400
                return None
            if kind == "cancel":
                with open_request(served, prompt=prompt, stream=form == "stream", **{**params, "max_tokens": 300}) as s:
                    if form == "stream":
                        s.recv(100)
                return None
            more = {"echo": True, "logprobs": 0} if form == "scored" else {}
            answer = served.complete(prompt=prompt, stream=form == "stream", **params, **more)
            assert answer.status == 200, answer.body
            choices = [e["choices"][0] for e in answer.events] if form == "stream" else answer.json["choices"]
            return (
                "".join(choice["text"] for choice in choices).removeprefix(
                    llm.tokenizer.decode(prompt) if form == "scored" else ""
                ),
                choices[-1]["finish_reason"],
            )

        with ThreadPoolExecutor(num_clients) as pool:
            found = list(pool.map(ask, range(num_requests)))
        for index, completion in enumerate(expected):
            if kinds[index] == "good":
                assert found[index] == (completion.text, completion.finish_reason), index
        served.wait_until_idle()


# The process

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_sigterm_finishes_what_is_under_way_and_exits_with_0(checkpoint, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--checkpoint", str(checkpoint), "--cache-gib", "0.01", "--served-model-name", "tiny"]
    with running_server(flags) as (url, process):
        place = urlsplit(url)
        assert place.hostname == "127.0.0.1"
        content = json.dumps({"prompt": [1, 2], "max_tokens": 500, "ignore_eos": True, "stream": True}).encode()
        with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
            head = f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
            received = connection.recv(4096)
            process.send_signal(signal.SIGTERM)

            def is_refused():
                try:
                    socket.create_connection((place.hostname, place.port), timeout=60).close()
                except ConnectionRefusedError:
                    return True
                return False

            wait_until(is_refused)
            while part := connection.recv(65536):
                received += part
        assert b"data: [DONE]" in received and received.count(b'"finish_reason":"length"') == 1
        assert process.wait(60) == 0


def test_a_drain_that_takes_too_long_is_cut(checkpoint, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--checkpoint", str(checkpoint), "--cache-gib", "0.01", "--drain-seconds", "0", "--dtype", "float32"]
    with running_server(flags) as (url, process):
        place = urlsplit(url)
        body = {"prompt": [[1]] * 200, "max_tokens": 300, "ignore_eos": True, "stream": True}
        content = json.dumps(body).encode()
        with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
            head = f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            received = connection.recv(1024)
            process.send_signal(signal.SIGTERM)
            while part := connection.recv(65536):
                received += part
            assert b'data: {"error":{"message":"the server ends' in received and b"[DONE]" not in received
            assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "error: --port: found 70000; expected at most 65535"),
        (["--port", "TAKEN"], "expected an address that is free"),
        (["--host", "no.such.host.invalid"], "error: --host, --port: no.such.host.invalid port 8000: "),
        (["--max-queue", "-1"], "error: --max-queue: found -1; expected at least 0"),
        (["--cache-gib", "0"], "error: --cache-gib: found 0.0; expected more than 0"),
        (["--api-key", ""], "error: --api-key or RRT_API_KEY: found"),
        (["--exit-policy", "static:5", "--port", "0"], "error: static exit: found loop 5; expected one in [0, 2)"),
        (["--exit-policy", "some"], "error: --exit-policy: found 'some'; expected never"),
    ],
)
def test_bad_flags_are_one_line(checkpoint, flags, message, capsys):
    from rrt.common.cli import run_command
    from rrt.serve.__main__ import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in flags]
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: main(["--checkpoint", str(checkpoint), *words]))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_the_extra_one_line_tells_what_to_install(checkpoint):
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'uvicorn' else find(name, *rest)\n"
        "from rrt.common.cli import run_command; from rrt.serve.__main__ import main\n"
        f"run_command(lambda: main(['--checkpoint', {str(checkpoint)!r}]))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "error: uvicorn is not installed; expected it: pip install" in ended.stderr
