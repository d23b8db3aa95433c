"""What the server refuses, with which status and message; no input makes it fail."""

import contextlib
import json
import socket
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rrt.serve.http import app
from rrt.serve.http.protocol import ChatRequest
from tests.util.servers import make_checkpoint, serving

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "a"}]
BAD_COMPLETIONS = [
    ({"prompt": None}, "prompt: found None; expected a text, a list of texts"),
    ({"prompt": []}, "prompt: found []; expected"),
    ({"prompt": [[]]}, "prompt: found [[]]; expected"),
    ({"prompt": ["a", [1]]}, "prompt: found ['a', [1]]; expected"),
    ({"prompt": [1, True]}, "prompt: found [1, True]; expected"),
    ({"prompt": [1.5]}, "prompt: found [1.5]; expected"),
    ({"prompt": ""}, "prompt: found no token; expected at least one"),
    ({"prompt": [420]}, "prompt: found token 420; expected tokens in [0, 420)"),
    ({"prompt": [[1], [-1]]}, "prompt[1]: found token -1"),
    ({"prompt": [10**30]}, "prompt: found token 1000000000000000000000000000000"),
    ({"prompt": [1] * 600}, "need 600 positions; expected at most max_positions = 512"),
    ({"max_tokens": 600}, "600 new ones need 600 positions"),
    ({"max_tokens": -1}, "max_tokens: found -1; expected greater than or equal to 0"),
    ({"max_tokens": "5"}, "max_tokens: found '5'; expected"),
    ({"max_tokens": 1.5}, "max_tokens: found 1.5; expected"),
    ({"max_tokens": True}, "max_tokens: found True; expected"),
    ({"temperature": -1}, "temperature: found -1.0; expected 0, or 1e-6 or more"),
    ({"temperature": 1e300 * 1e300}, "temperature: found inf; expected"),
    ({"top_p": -0.5}, "top_p: found -0.5; expected more than 0"),
    ({"top_p": float("nan")}, "top_p: found nan; expected"),
    ({"top_k": -1}, "top_k: found -1; expected a whole number, 0 or more"),
    ({"seed": -(2**63) - 1}, "seed: found -9223372036854775809; expected a whole number below 2^64"),
    ({"seed": 2**64}, "seed: found 18446744073709551616; expected"),
    ({"n": 0}, "n: found 0; expected greater than or equal to 1"),
    ({"n": 129}, "n: found 129; expected less than or equal to 128"),
    ({"n": 81}, "found 81 texts, prompts times n; expected at most 80"),
    ({"n": 2, "best_of": 3}, "best_of: found 3; expected n, 2"),
    ({"stop": [""]}, "stop: found ['']; expected a text"),
    ({"stop": [1]}, "stop: found [1]; expected a text"),
    ({"stop": ["a"] * 17}, "expected a text, or a list of up to 16"),
    ({"logprobs": 21}, "logprobs: found 21; expected less than or equal to 20"),
    ({"suffix": "a"}, "suffix: found 'a'; expected"),
    ({"logit_bias": {"5": 1}}, "logit_bias: found {'5': 1}; expected"),
    ({"presence_penalty": 0.5}, "presence_penalty: found 0.5; expected"),
    ({"stream_options": {"include_usage": True}}, "stream_options: found without stream"),
    ({"stream": True, "stream_options": {"a": 1}}, "stream_options.a: not known to this server"),
    ({"unknown": 1}, "unknown: not known to this server; expected no such field"),
    ({"other": None, "unknown": [1]}, "unknown: not known to this server; expected no such field"),
    ({"n": 20, "max_tokens": 300}, "found 6020 tokens, prompts and new ones of all choices; expected at most 4096"),
]
BAD_CHATS = [
    ({"messages": []}, "messages: found []; expected at least 1 item"),
    ({"messages": [{**USER[0], "tool_calls": [1]}]}, "messages.0.tool_calls: not known to this server"),
    ({"messages": [{"role": "user"}]}, "messages.0.content: missing; expected a value"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "expected parts of type text alone"),
    ({"messages": [{"role": "x", "content": "a"}]}, "the chat template cannot write these messages: role x"),
    ({"tools": [{}]}, "tools: found [{}]; expected"),
    ({"response_format": {"type": "json_object"}}, "response_format.type: found 'json_object'; expected 'text'"),
    ({"top_logprobs": 1}, "top_logprobs: found without logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: found 21; expected less than or equal to 20"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens: found beside max_completion_tokens"),
    ({"max_tokens": 0}, "max_tokens: found 0; expected greater than or equal to 1"),
]


@pytest.mark.parametrize(("path", "change", "message"), [
    *((COMPLETION, *case) for case in BAD_COMPLETIONS), *((CHAT, *case) for case in BAD_CHATS)
])  # fmt: skip
def test_a_bad_field_is_refused_by_name(server, path, change, message):
    body = {"prompt": [5], "max_tokens": 1} if path == COMPLETION else {"messages": USER}
    answer = server.post(path, {**body, **change})
    assert answer.status == 400, answer.body
    error = answer.json["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    # A stream is refused by its status too.
    if "stream_options" not in change:
        assert server.post(path, {**body, **change, "stream": True}).status == 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "body: Invalid JSON"),
        (b"{", "body: Invalid JSON"),
        (b"[]", "body: found []; expected"),
        (b"null", "body: found None; expected"),
        (b'{"prompt": "\xff"}', "body: Invalid JSON"),
        (b'{"prompt": ' + b"[" * 5000, "body: Invalid JSON"),
        (b"{}", "prompt: missing; expected a value"),
    ],
)
def test_a_body_that_is_no_request_is_refused(server, content, message):
    answer = server.post(COMPLETION, content)
    assert answer.status == 400 and answer.json["error"]["message"].startswith(message)


def test_a_path_a_method_and_a_type_that_are_not_there_are_refused(server):
    assert server.get("/nothing").status == 404
    assert server.get("/nothing").json["error"]["type"] == "not_found_error"
    answer = server.get(COMPLETION)
    assert answer.status == 405 and answer.headers["allow"] == "POST"
    plain = server.send("POST", COMPLETION, b"{}", {"Content-Type": "text/plain"})
    assert plain.status == 415 and "Content-Type: found text/plain; expected application/json" in plain.body.decode()
    answer = server.complete(prompt="a", model="gpt-4")
    assert answer.status == 404 and answer.json["error"]["code"] == "model_not_found"


def test_a_request_beyond_the_limit_is_refused_declared_or_not(server):
    large = json.dumps({"prompt": "a" * 70_000}).encode()
    assert server.post(COMPLETION, large).status == 413

    def chunks():
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    connection = server.connect()
    connection.request("POST", COMPLETION, chunks(), {"Content-Type": "application/json"}, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413 and b"--max-request-bytes" in response.read()
    connection.close()
    assert server.complete(prompt="a", max_tokens=1).status == 200


def test_a_request_that_the_cache_can_never_hold_is_refused_and_one_that_fits_is_served(checkpoint):
    with serving(checkpoint, cache_bytes=2**19) as served:
        positions = served.service.worker.decoder.cache.num_free_pages // 2 * 16
        assert positions < 400
        for stream in (False, True):
            answer = served.complete(prompt=[1] * (positions + 1), max_tokens=1, stream=stream)
            assert answer.status == 400 and "for which the cache has room" in answer.json["error"]["message"]
        # One that is scored too.
        scored = {"max_tokens": 0, "echo": True, "logprobs": 0}
        assert served.complete(prompt=[1] * (positions + 1), **scored).status == 400
        assert served.complete(prompt=[1] * positions, **scored).status == 200
        # All that go together are given up with the one that is refused.
        assert served.complete(prompt=[[1], [1] * (positions + 1)], max_tokens=1).status == 400
        assert served.complete(prompt=[1] * positions, max_tokens=1).status == 200
        served.wait_until_idle()


def test_a_model_without_a_template_has_no_chat(tmp_path):
    with serving(make_checkpoint(tmp_path, has_chat=False)) as served:
        answer = served.post(CHAT, {"messages": USER})
        assert answer.status == 400 and "tiny has no chat template" in answer.json["error"]["message"]
        assert served.get("/rrt/stats").json["has_chat"] is False


def test_the_key_opens_all_but_health_and_the_page(checkpoint):
    with serving(checkpoint, api_key="secret") as served:
        assert served.get("/health").status == served.get("/").status == served.get("/page.js").status == 200
        for path in ("/v1/models", "/metrics", "/rrt/stats"):
            for sent in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
                answer = served.get(path, **sent)
                assert answer.status == 401 and answer.json["error"]["code"] == "invalid_api_key"
            assert served.get(path, Authorization="Bearer secret").status == 200
        assert served.complete(prompt="a", max_tokens=1).status == 401
        body = {"prompt": "a", "max_tokens": 1}
        assert served.post(COMPLETION, body, Authorization="Bearer secret").status == 200
        assert served.post(COMPLETION, body, Authorization="Bearer sécret").status == 401
        # The key is enough to change the policy, from wherever it comes.
        header = {"Authorization": "Bearer secret", "X-Forwarded-For": "10.0.0.1"}
        assert served.post("/rrt/policy", {"policy": "never"}, **header).status == 200


# Fuzzing

NUMBERS = st.one_of(
    st.integers(-3, 20), st.floats(), st.sampled_from([2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, -0.0])
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["\ud800", "<s>", "\x00"]))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "prompt"]), inner, max_size=4
        ),
    ),
    max_leaves=8,
)
TEXTS = st.text(max_size=12)
COMMON = {
    "model": st.just("tiny"),
    "stream": st.booleans(),
    "n": st.integers(1, 3),
    "temperature": st.floats(0, 3),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 500),
    "seed": st.integers(0, 2**64 - 1),
    "stop": st.one_of(st.text(min_size=1, max_size=2), st.lists(st.text(min_size=1, max_size=2), max_size=3)),
    "ignore_eos": st.booleans(),
    "user": TEXTS,
    "presence_penalty": st.just(0),
    "logit_bias": st.just({}),
    "max_tokens": st.integers(1, 4),
}
LIKELY = {
    COMPLETION: {
        **COMMON,
        "prompt": st.one_of(
            st.text(min_size=1, max_size=12),
            st.lists(st.integers(0, 419), min_size=1, max_size=5),
            st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3),
            st.lists(st.lists(st.integers(0, 419), min_size=1, max_size=5), min_size=1, max_size=3),
        ),
        "max_tokens": st.integers(0, 4),
        "logprobs": st.integers(0, 20),
        "echo": st.booleans(),
        "suffix": st.just(""),
    },
    CHAT: {
        **COMMON,
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": TEXTS}),
            min_size=1,
            max_size=3,
        ),
        "logprobs": st.just(True),
        "tools": st.just([]),
        "response_format": st.just({"type": "text"}),
    },
    "/rrt/policy": {
        "policy": st.sampled_from(
            ["never", "verify", "auto", "static:0", "static:9", "confidence:nan", "entropy:1", ""]
        ),
    },
}
NEEDED = {COMPLETION: ["prompt"], CHAT: ["messages"], "/rrt/policy": ["policy"]}


@st.composite
def requests(draw):
    """Requests of which about half are good, and most of the others wrong in one field."""
    path = draw(st.sampled_from([COMPLETION] * 4 + [CHAT] * 3 + ["/rrt/policy"]))
    names = draw(st.lists(st.sampled_from(sorted(LIKELY[path])), max_size=7, unique=True))
    body = {"max_tokens": 2} if path != "/rrt/policy" else {}
    body |= {name: draw(LIKELY[path][name]) for name in [*NEEDED[path], *names]}
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        body[draw(st.sampled_from([*body, *LIKELY[path], "unknown"]))] = draw(VALUES)
    return path, body


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(request=requests())
def test_no_json_makes_the_server_fail(server, request):
    path, body = request
    answer = server.post(path, body)
    event(f"{path} {answer.status}")
    assert answer.status in (200, 400, 404), answer.body
    if answer.status == 200 and path != "/rrt/policy" and body.get("stream") is True:
        assert answer.events
    if answer.status == 400:
        assert answer.json["error"]["message"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_make_the_server_fail(server, data):
    good = json.dumps({"prompt": "ab", "max_tokens": 1, "stop": ["x"], "temperature": 0.5}).encode()
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        content = content or bytearray(b"x")
    assert server.post(COMPLETION, bytes(content)).status in (200, 400, 404)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [1] * 4000},
        {"messages": USER * 4097},
        {f"x{i}": 1 for i in range(4000)},
        {"messages": [{**USER[0], **{f"x{i}": 1 for i in range(4000)}}]},
        {"logit_bias": {f"x{i}": "a" for i in range(4000)}},
        {"response_format": {f"x{i}": 1 for i in range(4000)}},
    ],
    ids=["messages", "many messages", "fields", "fields of a message", "logit_bias", "response_format"],
)
def test_many_faults_are_few_errors(change):
    """Each error takes a microsecond, of which a body has room for a million."""
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate_json(json.dumps({"messages": USER, **change}))
    assert error.value.error_count() <= 2


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/9.9\r\n\r\n", b"200"),
        (b"\x00\x01\x02\r\n\r\n", b"400"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"4"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 1_000_000, b"4"),
        (b"GET /v1/models/%ff%00 HTTP/1.1\r\nHost: \xff\r\n\r\n", b"4"),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"403"),
        (b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", b"403"),
    ],
)
def test_bad_http_is_refused(server, request_bytes, status):
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        # The server may refuse before it has read all.
        with contextlib.suppress(ConnectionError):
            connection.sendall(request_bytes)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(65536).startswith(b"HTTP/1.1 " + status)
    assert server.get("/health").status == 200


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(app, "_BODY_SECONDS", 0.05)
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408") and b"body: found 1 bytes" in answer
