"""Few-shot scores of a real model on real documents against the harness's own `hf` model: `make test-real`."""

import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from eval.harness_lm import HarnessLM
from eval.harness_tasks import PAPER_METRICS, load_tasks
from rrt.checkpoint.source import load_model
from rrt.data.tokenizer import load_tokenizer
from tests.util.real import real_data, real_model_directory

DOCUMENTS = 12
"""Of each task."""


@pytest.mark.real
@pytest.mark.timeout(1200)
def test_scores_and_accuracies_of_real_tasks_are_those_of_the_hf_model():
    directory, data = real_model_directory(), real_data("tasks")
    names = [name for name in PAPER_METRICS if list(data.glob(f"{name}.*"))]
    assert len(names) >= 6, f"{data}: found files of {', '.join(names)} alone; expected those of six tasks"
    # PyTorch's log-softmax in fp32 over 49,152 logits is off by up to 6e-6 a token, 5e-4 for a long answer.
    hf = HFLM(str(directory), device="cpu", dtype="float32", batch_size=8, softmax_dtype="float64")
    tokenizer = load_tokenizer(directory)
    bos = tokenizer.encode("word", bos=False) != hf.tok_encode("word")
    ours = HarnessLM(load_model(directory, torch.float32), tokenizer, bos=bos, batch_tokens=1024)
    scores, results = [], []
    for lm in (ours, hf):
        tasks, _ = load_tasks(names, data, None)
        results.append(evaluate(lm, tasks, limit=DOCUMENTS, bootstrap_iters=0, log_samples=False)["results"])
        requests = [request for task in tasks["tasks"].values() for request in task.instances]
        scores.append([request.resps[0] for request in requests])
    for task in names:
        metric = f"{PAPER_METRICS[task]},none"
        assert results[0][task][metric] == results[1][task][metric], task
    assert [greedy for _, greedy in scores[0]] == [greedy for _, greedy in scores[1]]
    assert max(abs(a - b) for (a, _), (b, _) in zip(*scores, strict=True)) <= 1e-4
