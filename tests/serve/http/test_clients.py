"""The official openai client, and the harness's local-completions, whose scores are those of eval/fewshot.py."""

import openai
import pytest

import rrt
from tests.util.servers import SETTINGS, serving
from tests.util.tasks import write_task_files

TASKS = ["arc_easy", "lambada_openai", "piqa"]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_the_openai_client_completes_and_chats(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.completions.create(model="tiny", prompt="import os", max_tokens=8, temperature=0, logprobs=0)
    pieces = client.completions.create(model="tiny", prompt="import os", max_tokens=8, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert whole.choices[0].rrt["exit_loops"] == [1] * whole.usage.completion_tokens
    messages = [{"role": "user", "content": "import"}]
    options = dict(model="tiny", messages=messages, max_tokens=8, temperature=0, logprobs=True)
    chat = client.chat.completions.create(**options)
    deltas = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert deltas[-1].usage == chat.usage
    content = "".join(delta.choices[0].delta.content for delta in deltas[:-1])
    assert content == chat.choices[0].message.content
    assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens


def test_an_answer_is_taken_back_as_the_client_sends_it(client):
    messages = [{"role": "user", "content": "import"}]
    options = dict(model="tiny", max_tokens=3, temperature=0)
    answer = client.chat.completions.create(messages=messages, **options).choices[0].message
    expected = {"role": "assistant", "content": answer.content}
    for sent in (expected, answer, answer.model_dump(), {**expected, "annotations": [], "tool_calls": None}):
        again = client.chat.completions.create(messages=[*messages, sent, *messages], **options, extra_body={"x": None})
        if sent is expected:
            second = again
        assert again.choices[0].message == second.choices[0].message and again.usage == second.usage


def test_the_openai_client_raises_its_own_errors(client, checkpoint):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert error.value.param == "temperature" and "found -1.0" in error.value.message
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    with serving(checkpoint, api_key="secret") as served:
        url = f"{served.url}/v1"
        with openai.OpenAI(base_url=url, api_key="wrong") as other, pytest.raises(openai.AuthenticationError):
            other.models.list()
        with openai.OpenAI(base_url=url, api_key="secret") as right:
            assert right.completions.create(model="tiny", prompt="a", max_tokens=1).usage.completion_tokens == 1


def test_scores_through_the_harness_are_those_of_fewshot(server, checkpoint, tmp_path):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from eval.harness_lm import HarnessLM
    from eval.harness_tasks import load_tasks, quiet_harness, run_harness

    quiet_harness()
    data = write_task_files(tmp_path / "tasks", documents=5)
    model, tokenizer = rrt.load_model(checkpoint, dtype=SETTINGS.dtype), rrt.load_tokenizer(checkpoint)
    ours = HarnessLM(model, tokenizer, bos=False, batch_tokens=512)
    theirs = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="tiny",
        tokenizer=str(checkpoint),
        tokenizer_backend="huggingface",
        max_length=512,
        batch_size=4,
        max_retries=1,
    )
    tasks, _ = load_tasks(TASKS, data, None)
    for task in tasks["tasks"].values():
        task.build_all_requests()
        found, expected = theirs.loglikelihood(task.instances), ours.loglikelihood(task.instances)
        assert len(found) > 4
        for (value, is_greedy), (right, right_greedy) in zip(found, expected, strict=True):
            assert value == pytest.approx(right, abs=1e-9) and is_greedy == right_greedy
    tasks, _ = load_tasks(TASKS, data, None)
    found, expected = run_harness(theirs, tasks, None), run_harness(ours, tasks, None)
    for task, result in expected.items():
        assert found[task]["metrics"] == pytest.approx(result["metrics"])
