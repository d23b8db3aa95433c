"""The server on a real model: chats through the openai client, and few-shot scores of real tasks."""

import openai
import pytest
import torch

import rrt
from rrt.folding.conversion import convert
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.serve.exits import Verify
from tests.util.real import real_data, real_model, real_model_directory
from tests.util.servers import serving

pytestmark = pytest.mark.real
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
SIZES = dict(cache_bytes=2**28, dtype=torch.float32, max_request_bytes=2**22, max_tokens_per_request=2**16)


def chat(served, **options):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, **options)
        pieces = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, stream=True, **options)
        assert "".join(piece.choices[0].delta.content for piece in pieces) == answer.choices[0].message.content
    return answer.choices[0]


def test_the_base_answers_a_chat():
    with serving(real_model(), policy="never", **SIZES) as served:
        choice = chat(served)
        assert "Paris" in choice.message.content and choice.finish_reason == "stop"
        served.wait_until_idle()


def test_the_folded_model_answers_with_the_text_of_the_python_api(tmp_path):
    folded = tmp_path / "folded"
    convert(real_model(), folded, RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(64)))
    llm = rrt.LLM(folded, device="cpu", policy=Verify(), cache_bytes=2**26)
    text = llm.tokenizer.apply_chat_template(MESSAGES)
    ids = llm.tokenizer.encode(text, bos=False, parse_special=True)
    (expected,) = llm.generate([ids], rrt.SamplingParams(max_new_tokens=24))
    with serving(folded, **SIZES) as served:
        assert chat(served, max_tokens=24).message.content == expected.text
        served.wait_until_idle()


def test_scores_of_real_tasks_through_the_harness_are_those_of_fewshot():
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from eval.harness_lm import HarnessLM
    from eval.harness_tasks import load_tasks, quiet_harness

    quiet_harness()
    path = real_model_directory()
    ours = HarnessLM(rrt.load_model(path), rrt.load_tokenizer(path), bos=False, batch_tokens=2048)
    with serving(path, policy="never", **SIZES) as served:
        theirs = LocalCompletionsAPI(
            base_url=f"{served.url}/v1/completions",
            model="tiny",
            tokenizer=str(path),
            tokenizer_backend="huggingface",
            batch_size=4,
            max_retries=1,
        )
        tasks, _ = load_tasks(["arc_easy", "lambada_openai", "piqa"], real_data("tasks"), None)
        for task in tasks["tasks"].values():
            task.build_all_requests(limit=10)
            found, expected = theirs.loglikelihood(task.instances), ours.loglikelihood(task.instances)
            for (value, is_greedy), (right, right_greedy) in zip(found, expected, strict=True):
                # In fp32 sums of another order: of the last digits.
                assert value == pytest.approx(right, abs=2e-3, rel=1e-4) and is_greedy == right_greedy
