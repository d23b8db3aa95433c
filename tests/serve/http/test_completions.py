"""Answers of the server: the texts, tokens and log-probabilities of the Python API, in OpenAI's form."""

import json

import pytest
import torch

import rrt
from rrt.checkpoint.source import load_model
from rrt.data.tokenizer import load_tokenizer
from rrt.serve.exits import Verify
from rrt.serve.http.answers import CompletionChoice, TokenNames
from rrt.serve.http.metrics import Metrics
from rrt.serve.http.scores import PromptScores, score_prompt
from rrt.serve.http.worker import Call, Delta, Text, Worker, _Progress
from rrt.serve.requests import NewToken
from rrt.serve.text import RequestText
from tests.util.models import make_hf_model
from tests.util.servers import serving
from tests.util.tokenizers import make_sentencepiece_tokenizer

PROMPTS = ["def main(", "import os\n", "class A:"]


@pytest.fixture(scope="module")
def llm(checkpoint):
    return rrt.LLM(checkpoint, dtype=torch.float64, device="cpu", cache_bytes=2**22, policy=Verify())


def generate(llm, prompts, **params):
    return llm.generate(prompts, rrt.SamplingParams(**params))


def test_texts_are_those_of_the_python_api(server, llm):
    expected = generate(llm, PROMPTS, max_new_tokens=12)
    answer = server.complete(model="tiny", prompt=PROMPTS, max_tokens=12, temperature=0)
    assert answer.status == 200
    body = answer.json
    assert body["object"] == "text_completion" and body["model"] == "tiny" and body["id"].startswith("cmpl-")
    for index, (choice, one) in enumerate(zip(body["choices"], expected, strict=True)):
        assert choice["index"] == index and choice["logprobs"] is None
        assert (choice["text"], choice["finish_reason"]) == (one.text, one.finish_reason)
        assert choice["rrt"] == {
            "tokens": one.tokens,
            "exit_loops": one.exit_loops,
            "agreed_loops": one.agreed_loops,
        }
    encoded = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    prompt, new = sum(map(len, encoded)), sum(len(one.tokens) for one in expected)
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    # The other three forms of a prompt.
    texts = [choice["text"] for choice in body["choices"]]
    again = server.complete(prompt=encoded, max_tokens=12, temperature=0).json
    assert [choice["text"] for choice in again["choices"]] == texts
    for prompt in (PROMPTS[0], encoded[0]):
        (choice,) = server.complete(prompt=prompt, max_tokens=12, temperature=0).json["choices"]
        assert choice["text"] == texts[0]


def test_a_stream_has_the_same_text_in_pieces(server, llm):
    expected = generate(llm, PROMPTS[:2], max_new_tokens=10)
    answer = server.complete(
        prompt=PROMPTS[:2], max_tokens=10, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *events, last = answer.events
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == sum(len(one.tokens) for one in expected)
    assert len({event["id"] for event in events}) == 1 and all(event["usage"] is None for event in events)
    for index, one in enumerate(expected):
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == one.text
        assert [token for piece in pieces for token in piece["rrt"]["tokens"]] == one.tokens
        assert [loop for piece in pieces for loop in piece["rrt"]["agreed_loops"]] == one.agreed_loops
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [one.finish_reason]
        assert len(pieces) > 1


def test_choices_have_seeds_that_follow_one_another(server, llm):
    params = [rrt.SamplingParams(temperature=1.5, top_p=0.9, seed=7 + i, max_new_tokens=8) for i in range(3)]
    expected = [one.text for one in llm.generate([PROMPTS[0]] * 3, params)]
    body = {"prompt": PROMPTS[:1], "n": 3, "seed": 7, "temperature": 1.5, "top_p": 0.9, "max_tokens": 8}
    assert [choice["text"] for choice in server.complete(**body).json["choices"]] == expected
    # One more than the largest is the smallest.
    wrapped = server.complete(**{**body, "n": 2, "seed": 2**64 - 1}).json["choices"]
    alone = server.complete(**{**body, "n": 1, "seed": 0}).json["choices"]
    assert wrapped[1]["text"] == alone[0]["text"]
    # Without a seed two requests differ.
    texts = {server.complete(prompt=PROMPTS[0], max_tokens=16).json["choices"][0]["text"] for _ in range(3)}
    assert len(texts) > 1
    # And within one, prompts differ without a seed alone.
    for seed, count in (({}, 3), ({"seed": 5}, 1)):
        choices = server.complete(prompt=PROMPTS[:1] * 3, max_tokens=16, **seed).json["choices"]
        assert len({choice["text"] for choice in choices}) == count


def test_a_completion_goes_on_from_its_prompt_with_the_space_between(tmp_path):
    base = make_hf_model(tmp_path / "llama", "llama", vocab_size=420)
    make_sentencepiece_tokenizer(base, "llama")
    tokenizer = load_tokenizer(base)
    prompt = [*tokenizer.encode("import json"), *tokenizer.encode("def main", bos=False)]
    with serving(base) as served:
        # Any token may come.
        body = {"max_tokens": 40, "temperature": 9.0, "seed": 3, "ignore_eos": True}
        for stream in (False, True):
            answer = served.complete(prompt=prompt, echo=True, stream=stream, **body)
            choices = [event["choices"][0] for event in answer.events] if stream else answer.json["choices"]
            tokens = [token for choice in choices for token in choice["rrt"]["tokens"]]
            assert "".join(choice["text"] for choice in choices) == tokenizer.decode([*prompt, *tokens])
    spaced = [token for token in range(420) if tokenizer.decode([*prompt, token]).endswith(" a")]
    text = RequestText(tokenizer, rrt.SamplingParams(), prompt)
    assert spaced and text.push(NewToken(0, spaced[0], 0, 0)) == " a"


def test_a_stop_string_and_an_end_token_end_a_text(server, llm):
    (whole,) = generate(llm, PROMPTS[:1], max_new_tokens=12)
    stop = whole.text[len(whole.text) // 2 :][:3]
    for stream in (False, True):
        answer = server.complete(prompt=PROMPTS[0], max_tokens=12, temperature=0, stop=["absent", stop], stream=stream)
        choices = [event["choices"][0] for event in answer.events] if stream else answer.json["choices"]
        assert "".join(choice["text"] for choice in choices) == whole.text[: whole.text.find(stop)]
        assert choices[-1]["finish_reason"] == "stop"
    # At this temperature any token comes soon, the end too; with ignore_eos it ends nothing.
    body = {"prompt": PROMPTS[0], "max_tokens": 100, "temperature": 9.0, "top_k": 420}
    stopped = next((seed for seed in range(40) if _reason(server, **body, seed=seed) == "stop"), None)
    assert stopped is not None
    assert _reason(server, **body, seed=stopped, ignore_eos=True) == "length"


def _reason(server, **body):
    return server.complete(**body).json["choices"][0]["finish_reason"]


def test_log_probabilities_of_new_tokens_are_the_models(server, llm, checkpoint):
    drawn = {"temperature": 1.3, "seed": 3}
    (one,) = generate(llm, PROMPTS[:1], max_new_tokens=6, logprobs=True, **drawn)
    (choice,) = server.complete(prompt=PROMPTS[0], max_tokens=6, logprobs=2, **drawn).json["choices"]
    found = choice["logprobs"]
    assert found["token_logprobs"] == pytest.approx(one.logprobs, abs=1e-6)
    names = [llm.tokenizer.decode([token]) for token in one.tokens]
    ids = [*llm.tokenizer.encode(PROMPTS[0]), *one.tokens]
    logs = load_model(checkpoint, dtype=torch.float64)(torch.tensor([ids])).detach()[0, -7:-1].log_softmax(-1)
    for place, (name, top) in enumerate(zip(found["tokens"], found["top_logprobs"], strict=True)):
        assert name == names[place] or name.startswith("token_id:")
        assert found["token_logprobs"][place] == pytest.approx(float(logs[place, one.tokens[place]]), abs=1e-6)
        best = logs[place].topk(2).values.tolist()
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(best, abs=1e-6)
        # The chosen token is there too.
        assert top[name] == found["token_logprobs"][place] and len(top) in (2, 3)
    assert 3 in map(len, found["top_logprobs"])
    offsets = found["text_offset"]
    assert offsets == sorted(offsets) and choice["text"].startswith(names[0]) and offsets[:2] == [0, len(names[0])]
    none = server.complete(prompt=PROMPTS[0], max_tokens=6, logprobs=0, **drawn).json["choices"][0]["logprobs"]
    assert none["top_logprobs"] == [None] * 6 and none["token_logprobs"] == found["token_logprobs"]


class Letters:
    """A tokenizer with a byte for each token: letters, x twice, and the three bytes of one character."""

    vocab_size = 10

    def decode(self, ids):
        return bytes(b"abcwxzx\xe6\x97\xa5"[i] for i in ids).decode(errors="replace")


def test_offsets_of_held_back_text_are_the_tokens_places():
    sent = []

    def advance(tokens, stop, streams):
        worker = Worker.__new__(Worker)
        worker._metrics, worker._outbox = Metrics(1), []
        params = rrt.SamplingParams(stop=stop)
        text = Text([0], params)
        progress = _Progress(Call([text], streams=streams), 0, RequestText(Letters(), params))
        for place, token in enumerate(tokens):
            reason = "length" if place == len(tokens) - 1 else None
            worker._advance(progress, NewToken(0, token, 0, 0, -1.0, reason))
        choice = CompletionChoice(TokenNames(Letters()), text, 0, None, 0)
        parts = [choice.part(delta) for _, _, delta in worker._outbox]
        sent.append("".join(part["text"] for part in parts))
        return [offset for part in parts for offset in part["logprobs"]["text_offset"]]

    for streams in (False, True):
        assert advance([4, 0, 1, 5, 3], ("abc",), streams) == [0, 1, 2, 3, 4]
        assert advance([7, 8, 9, 0, 1], (), streams) == [0, 0, 0, 1, 2]
    assert advance([4, 0, 1, 2], ("abc",), False) == [0, 1, 1, 1]
    assert sent == ["xabzw", "日ab"] * 2 + ["x"]


def test_offsets_and_names_of_a_prompt():
    text = Text([7, 8, 9, 0, 6], None)
    choice = CompletionChoice(TokenNames(Letters()), text, 0, "日ax", 1)
    # Of two tokens of one text the one that is there has it.
    scores = PromptScores([-1.0] * 3 + [-2.0], [((0, -1.0),)] * 3 + [((4, -1.0),)], torch.zeros(10), ())
    choice.add_scores(scores)
    found = choice.part(Delta("", (), (), "length"))["logprobs"]
    assert found["text_offset"] == [0, 0, 0, 1, 2]
    assert found["tokens"][-1] == "x" and found["top_logprobs"][-1] == {"x": -2.0, "token_id:4": -1.0}


def test_scores_keep_no_other_logits(llm):
    scores = score_prompt(llm.engine.decoder.model, [1, 2, 3], 0)
    assert scores.next_logits.untyped_storage().nbytes() == scores.next_logits.nbytes


def test_values_of_other_servers_limits_are_taken(server):
    body = {"prompt": PROMPTS[0], "max_tokens": 4}
    greedy = server.complete(**body, temperature=0).json["choices"][0]["text"]
    assert server.complete(**body, top_p=0).json["choices"][0]["text"] == greedy
    negative, wrapped = (server.complete(**body, seed=seed).json["choices"][0] for seed in (-2, 2**64 - 2))
    assert negative == wrapped
    more = {"metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True, "store": False}
    messages = [{"role": "user", "content": "a"}]
    assert server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1, **more}).status == 200


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_shows_the_prompt_with_the_models_own_log_probabilities(server, llm, checkpoint, max_tokens, stream):
    prompt = "def main(arguments):"
    ids = llm.tokenizer.encode(prompt)
    logs = load_model(checkpoint, dtype=torch.float64)(torch.tensor([ids])).detach()[0].log_softmax(-1)
    expected = [float(logs[place, token]) for place, token in enumerate(ids[1:])]
    top = 3
    answer = server.complete(
        prompt=ids, max_tokens=max_tokens, temperature=0, echo=True, logprobs=top, n=2, stream=stream
    )
    events = [event["choices"][0] for event in answer.events] if stream else answer.json["choices"]
    new = generate(llm, [ids], max_new_tokens=max(max_tokens, 1))[0]
    for index in range(2):
        parts = [event for event in events if event["index"] == index]
        assert "".join(part["text"] for part in parts) == prompt + (new.text if max_tokens else "")
        found = {name: [entry for part in parts for entry in part["logprobs"][name]] for name in parts[0]["logprobs"]}
        assert {len(entries) for entries in found.values()} == {len(ids) + max_tokens}
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-9)
        for place, tops in enumerate(found["top_logprobs"][1 : len(ids)]):
            best = logs[place].topk(top).values.tolist()
            assert sorted(tops.values(), reverse=True)[:top] == pytest.approx(best, abs=1e-9)
            assert found["token_logprobs"][place + 1] in tops.values() and len(tops) in (top, top + 1)
        assert [token for part in parts for token in part["rrt"]["tokens"]] == new.tokens[:max_tokens]
        if max_tokens:
            assert len(found["top_logprobs"][-1]) == 3
    assert found["text_offset"][: len(ids)] == [len(llm.tokenizer.decode(ids[:i])) for i in range(len(ids))]


def test_echo_without_log_probabilities_and_no_new_tokens_at_all(server):
    assert server.complete(prompt="a b", max_tokens=0, echo=True).json["choices"][0]["text"] == "a b"
    choice = server.complete(prompt="a b", max_tokens=0).json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_answered_by_its_template(server, llm, stream):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "import os"}]
    text = llm.tokenizer.apply_chat_template(messages)
    ids = llm.tokenizer.encode(text, bos=False, parse_special=True)
    (one,) = generate(llm, [ids], max_new_tokens=9, logprobs=True)
    messages[1]["content"] = [{"type": "text", "text": "import "}, {"type": "text", "text": "os"}]
    body = {"messages": messages, "max_completion_tokens": 9, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = server.post("/v1/chat/completions", {**body, "stream": stream})
    if stream:
        events = answer.events
        assert {event["object"] for event in events} == {"chat.completion.chunk"}
        choices = [event["choices"][0] for event in events]
        assert choices[0]["delta"]["role"] == "assistant" and "role" not in choices[1]["delta"]
        found = "".join(choice["delta"]["content"] for choice in choices)
    else:
        assert answer.json["object"] == "chat.completion"
        choices = answer.json["choices"]
        assert choices[0]["message"]["role"] == "assistant"
        found = choices[0]["message"]["content"]
        assert answer.json["usage"]["prompt_tokens"] == len(ids)
    assert found == one.text and choices[-1]["finish_reason"] == one.finish_reason
    entries = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    assert [entry["logprob"] for entry in entries] == pytest.approx(one.logprobs, abs=1e-9)
    for entry in entries:
        first, second = entry.pop("top_logprobs")
        # Nothing was drawn.
        assert first == entry and second["logprob"] <= first["logprob"]


def test_a_chat_without_a_limit_has_what_there_is_room_for(server, llm):
    answer = server.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "temperature": 0, "ignore_eos": True},
    )
    usage = answer.json["usage"]
    # The last new token is never read.
    assert usage["total_tokens"] == llm.engine.decoder.max_positions + 1


def test_models_and_health(server):
    (card,) = server.get("/v1/models").json["data"]
    assert card["id"] == "tiny" and card["object"] == "model" and card["max_model_len"] == 512
    assert server.get("/v1/models/tiny").json == card
    assert server.get("/v1/models/other/name").status == 404
    assert server.get("/health").json == {"status": "ok"}


def test_the_longest_text_is_what_the_cache_and_a_request_may_have(checkpoint):
    for limits in ({"cache_bytes": 2**17}, {"max_tokens_per_request": 100}):
        with serving(checkpoint, **limits) as served:
            (card,) = served.get("/v1/models").json["data"]
            most = card["max_model_len"]
            assert 0 < most < 512
            body = {"prompt": [1] * (most - 4), "temperature": 0}
            assert served.complete(**body, max_tokens=4).status == 200
            # The last new token is never read, and needs no room in the cache.
            assert served.complete(**body, max_tokens=6).status == 400


def test_metrics_count_tokens_passes_rows_and_exits(server):
    def read():
        lines = server.get("/metrics").body.decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    server.wait_until_idle()
    before = read()
    answer = server.complete(prompt=[1, 2, 3], max_tokens=5, temperature=0, ignore_eos=True).json
    server.wait_until_idle()
    after = read()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["rrt_prompt_tokens_total"] == 3 and grown["rrt_new_tokens_total"] == 5
    depth = answer["choices"][0]["rrt"]
    for loop in (0, 1):
        assert grown[f'rrt_exits_total{{loop="{loop}"}}'] == depth["exit_loops"].count(loop)
        assert grown[f'rrt_agreed_total{{loop="{loop}"}}'] == depth["agreed_loops"].count(loop)
    # Two loops of the prompt, and at least two rows for each further token.
    assert grown["rrt_rows_total"] >= 2 * 3 + 2 * 4 and grown["rrt_passes_total"] >= 2 + 4
    assert grown["rrt_head_rows_total"] >= 5
    assert grown["rrt_time_to_first_token_seconds_count"] == grown["rrt_time_per_output_token_seconds_count"] == 1
    assert grown['rrt_http_responses_total{path="/v1/completions",status="200"}'] == 1
    assert after["rrt_pages_used"] == after["rrt_texts_open"] == after["rrt_texts_in_engine"] == 0
    assert after["rrt_pages_free"] == server.service.worker.decoder.cache.num_free_pages
    stats = server.get("/rrt/stats").json
    assert stats["policy"] == "verify" and sum(stats["exits"]) >= 5 and stats["tokens_per_second"] > 0


def test_choices_of_one_prompt_compute_it_once(server):
    reused = server.service.metrics.reused_tokens._value
    before = reused.get()
    prompt = [(7 * i) % 420 for i in range(100)]
    choices = server.complete(prompt=prompt, n=3, max_tokens=4, temperature=1.0, seed=0).json["choices"]
    assert len(choices) == 3
    # Whole pages of 16.
    assert reused.get() - before == 2 * 96


def test_the_page_is_there_and_loads_nothing_from_elsewhere(server):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        answer = server.get(path)
        assert answer.status == 200 and answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        text = answer.body.decode()
        assert "://" not in text and "innerHTML" not in text and " style=" not in text


def test_answers_are_ascii(server):
    answer = server.complete(prompt="日本語 \ud83c\udf89", max_tokens=0, echo=True)
    assert answer.body.isascii() and json.loads(answer.body)["choices"][0]["text"] == "日本語 🎉"
