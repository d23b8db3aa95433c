"""eval/local_tasks.py: what a data set's schema does not allow is refused with the file, the record and the field."""

import gzip
import json

import pytest

from tests.util.tasks import task_records, write_task_files

pytest.importorskip("lm_eval")

import pyarrow
import pyarrow.parquet

from eval.harness_tasks import PAPER_METRICS, load_tasks
from eval.local_tasks import data_files, local_task
from rrt.errors import UserError

WRONG = [
    ("piqa", {"label": "1"}, "field 'label': found '1'; expected 0 or 1, an integer"),
    ("piqa", {"label": True}, "field 'label': found True"),
    ("piqa", {"label": -1}, "field 'label': found -1"),
    ("piqa", {"sol2": None}, "field 'sol2': found None; expected a text"),
    ("lambada_openai", {"text": "word"}, "field 'text': found 'word'; expected a text of at least two words"),
    ("lambada_openai", {"text": "two words "}, "field 'text': found 'two words '; expected a text"),
    ("lambada_openai", {"text": " word"}, "field 'text': found ' word'; expected a text"),
    ("hellaswag", {"label": "4"}, "field 'label': found '4'; expected the index of one of 'endings'"),
    ("hellaswag", {"label": ""}, "field 'label': found ''"),
    ("hellaswag", {"endings": ["a", ""]}, "field 'endings': found ['a', '']; expected a list of texts"),
    ("winogrande", {"answer": 1}, "field 'answer': found 1; expected '1' or '2', a string"),
    ("winogrande", {"sentence": "no blank"}, "field 'sentence': found 'no blank'; expected a text with a '_'"),
    ("arc_easy", {"answerKey": "Z"}, "field 'answerKey': found 'Z'; expected one of the labels"),
    ("arc_challenge", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "field 'choices': found {"),
    ("arc_easy", {"choices": [{"text": "a", "label": "A"}]}, "expected an object with 'text' and 'label'"),
    ("openbookqa", {"answerKey": 2}, "field 'answerKey': found 2"),
]


def write(directory, task, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (directory / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return local_task(task, data_files(task, directory, 0))


@pytest.mark.parametrize(("task", "change", "message"), WRONG)
def test_a_record_outside_the_schema_is_refused(tmp_path, task, change, message):
    records = task_records(3, 0)[task]
    write(tmp_path, task, records)
    records[1] |= change
    with pytest.raises(UserError) as error:
        write(tmp_path, task, records)
    assert str(error.value).startswith(f"{tmp_path / task}.jsonl: line 2: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not valid JSON"),
        ("[1]", "line 3: found [1]; expected an object"),
        ("{}", "line 3: field 'goal': found no such field; expected a text"),
    ],
)
def test_a_line_that_is_no_record_is_refused(tmp_path, line, message):
    with pytest.raises(UserError) as error:
        write(tmp_path, "piqa", [*task_records(2, 0)["piqa"], line])
    assert message in str(error.value)


def test_fields_of_different_types_in_different_records_are_refused(tmp_path):
    records = task_records(2, 0)["hellaswag"]
    records[0]["label"] = 2
    with pytest.raises(UserError, match=r"hellaswag\.jsonl: found fields of different types"):
        write(tmp_path, "hellaswag", records)


def test_missing_empty_and_doubled_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--data-dir: found .*absent; expected a directory"):
        data_files("piqa", tmp_path / "absent", 0)
    with pytest.raises(UserError, match=r"found none; expected piqa\.jsonl, piqa\.jsonl\.gz or piqa\.parquet"):
        data_files("piqa", tmp_path, 0)
    with pytest.raises(UserError, match=r"piqa\.jsonl: found no record"):
        write(tmp_path, "piqa", ["", ""])
    with pytest.raises(UserError, match=r"found none; expected piqa\.train\.jsonl, piqa\.train\.jsonl\.gz or"):
        data_files("piqa", tmp_path, 2)
    (tmp_path / "piqa.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"found piqa\.jsonl and piqa\.parquet; expected piqa\.jsonl, "):
        data_files("piqa", tmp_path, 0)
    (tmp_path / "piqa.jsonl").unlink()
    with pytest.raises(UserError, match=r"piqa\.parquet: not a Parquet file"):
        local_task("piqa", data_files("piqa", tmp_path, 0))


def test_parquet_and_gzip_files_give_the_requests_of_the_same_records_as_lines(tmp_path):
    write_task_files(tmp_path / "lines", documents=3)
    requests = []
    for data in (tmp_path / "lines", tmp_path / "parquet", tmp_path / "gzip"):
        data.mkdir(exist_ok=True)
        for task, records in task_records(3, 0).items():
            if data.name == "parquet":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), data / f"{task}.parquet")
            elif data.name == "gzip":
                lines = (tmp_path / "lines" / f"{task}.jsonl").read_bytes()
                (data / f"{task}.jsonl.gz").write_bytes(gzip.compress(lines))
        tasks, files = load_tasks(list(PAPER_METRICS), data, None)
        assert sorted(path.parent.name for path in files.values()) == [data.name] * 7
        for task in tasks["tasks"].values():
            task.build_all_requests()
        requests.append([request.args for task in tasks["tasks"].values() for request in task.instances])
    assert requests[0] == requests[1] == requests[2]


def test_gzip_files_that_are_not_whole_are_refused(tmp_path):
    whole = gzip.compress(json.dumps(task_records(1, 0)["piqa"][0]).encode())
    for content in (whole[:-9], whole[:20], b"no gzip", whole[:15] + bytes([whole[15] ^ 255]) + whole[16:]):
        (tmp_path / "piqa.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"piqa\.jsonl\.gz: (not a whole gzip file|line 1: not valid JSON)"):
            local_task("piqa", data_files("piqa", tmp_path, 0))


def test_what_a_task_makes_of_its_records_is_made_once(tmp_path):
    write_task_files(tmp_path, documents=3)
    (task,) = load_tasks(["hellaswag"], tmp_path, None)[0]["tasks"].values()
    assert task.validation_docs() is task.validation_docs()


def test_prompts_are_those_of_the_papers_protocol(tmp_path):
    """Of the harness's own tasks: context and continuation as published."""
    records = {
        "lambada_openai": {"text": "He said hello"},
        "hellaswag": {
            "activity_label": "Cooking",
            "ctx_a": "[header] How to cook [title] Begin.",
            "ctx_b": "then stir",
            "endings": ["[step] slowly.", "fast."],
            "label": "1",
        },
        "piqa": {"goal": "Open a jar", "sol1": "Turn it", "sol2": "Eat it", "label": 0},
        "winogrande": {"sentence": "Ann saw Eve as _ ran.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        "arc_easy": {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["1", "2"]}, "answerKey": "2"},
        "arc_challenge": {"question": "Why?", "choices": {"text": ["so"], "label": ["A"]}, "answerKey": "A"},
        "openbookqa": {"question_stem": "The sun", "choices": {"text": ["is"], "label": ["A"]}, "answerKey": " A"},
    }
    for task, record in records.items():
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(record) + "\n")
    tasks, _ = load_tasks(list(records), tmp_path, None)
    requests = []
    for task in tasks["tasks"].values():
        task.build_all_requests()
        requests += [request.args for request in task.instances]
    assert requests == [
        ("He said", " hello"),
        ("Cooking: How to cook. Begin. Then stir", "  slowly."),  # two spaces: the harness takes "[step]" out
        ("Cooking: How to cook. Begin. Then stir", " fast."),
        ("Question: Open a jar\nAnswer:", " Turn it"),
        ("Question: Open a jar\nAnswer:", " Eat it"),
        ("Ann saw Eve as Ann", " ran."),
        ("Ann saw Eve as Eve", " ran."),
        ("Question: Why?\nAnswer:", " so"),
        ("Question: Why?\nAnswer:", " no"),
        ("Question: Why?\nAnswer:", " so"),
        ("The sun", " is"),
    ]
