"""The estimate of a calibrated conversion's disk space, against what one takes, and refusals before it starts."""

import pytest

from rrt.errors import UserError
from rrt.folding import calibration_space, conversion
from rrt.folding.conversion import CalibrationOptions, convert, prepare_conversion, run_conversion
from rrt.folding.workspace import Workspace
from rrt.model.config import LoraRanks, RecursiveConfig
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_sentencepiece_tokenizer, training_texts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = make_sentencepiece_tokenizer(tmp_path_factory.mktemp("bases") / "llama", "llama", vocab_size=420)
    return make_hf_model(path, "llama", vocab_size=420)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(training_texts()))
    return path


def arguments(base, out, text, **options):
    recursion = RecursiveConfig(num_loops=2, init="average", lora_rank=LoraRanks.uniform(4), lora_init="calibrated")
    chosen = CalibrationOptions((str(text),), **{"num_tokens": 1536, "context": 24, "device": "cpu", **options})
    return {"base": base, "out": out, "recursion": recursion, "calibration": chosen}


def free(monkeypatch, count):
    monkeypatch.setattr(calibration_space, "free_bytes", lambda path: count)


def estimate(monkeypatch, given):
    """Return the bytes that a conversion is expected to take on the disk of its output."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(calibration_space, "_check", lambda place, needed, *_: found.append(needed))
        prepare_conversion(**given)
    return found[-1]


@pytest.mark.parametrize(
    "options", [{}, {"metric": "activations"}, {"memory": 0}, {"metric": "inputs"}], ids=lambda each: str(each)
)
def test_the_estimate_is_what_a_conversion_takes(base, text, options, tmp_path, monkeypatch):
    given = arguments(base, tmp_path / "out", text, **options)
    estimated = estimate(monkeypatch, given)
    largest, save = [0], Workspace.save

    def measured(workspace, name, tensors):
        save(workspace, name, tensors)
        largest.append(sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")))

    monkeypatch.setattr(Workspace, "save", measured)
    prepared = prepare_conversion(**given)
    run_conversion(prepared)
    # Headers of files, which count in small models alone, are not in it; the orders of neurons are not, either.
    assert 0.8 * estimated < max(largest) + prepared.after.bytes < 1.5 * estimated


def test_a_disk_that_is_too_small_is_refused_in_one_line_before_any_work(base, text, tmp_path, monkeypatch):
    free(monkeypatch, 10_000)
    with pytest.raises(UserError) as caught:
        convert(**arguments(base, tmp_path / "out", text))
    assert str(caught.value).startswith(f"{tmp_path / 'out'}: found 9.77 KiB free on its disk; expected ")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"statistics: found 9\.77 KiB free on its disk; expected .* another --calibr"):
        convert(**arguments(base, tmp_path / "out", text, statistics=tmp_path / "statistics"))
    assert not list(tmp_path.iterdir())


def test_what_an_interrupted_conversion_left_counts_as_free(base, text, tmp_path, monkeypatch):
    given = arguments(base, tmp_path / "out", text)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            convert(**given)
    left = sum(path.stat().st_size for path in (tmp_path / "out.calibration").glob("*.safetensors"))
    missing = estimate(monkeypatch, given) - left
    assert missing > 0
    free(monkeypatch, missing - 1)
    with pytest.raises(UserError, match="free on its disk"):
        prepare_conversion(**given)
    free(monkeypatch, missing)
    prepare_conversion(**given)


def test_an_interrupted_conversion_goes_on_with_the_memory_that_it_began_with(base, text, tmp_path, monkeypatch):
    given = arguments(base, tmp_path / "out", text)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            convert(**given)
    left = sum(path.stat().st_size for path in (tmp_path / "out.calibration").glob("*.safetensors"))
    assert left > 0
    monkeypatch.setattr(conversion, "free_bytes", lambda path: 1000)
    assert prepare_conversion(**given).calibration.memory == (1000 + left) // 2


def test_statistics_on_the_disk_of_the_output_are_counted_together(base, text, tmp_path, monkeypatch):
    separate = arguments(base, tmp_path / "out", text, metric="activations", statistics=tmp_path / "statistics")
    together = estimate(monkeypatch, separate)
    assert together == estimate(monkeypatch, arguments(base, tmp_path / "out", text, metric="activations"))
    free(monkeypatch, together - 1)
    with pytest.raises(UserError, match=r"out: found .* on another disk than --calibration-statistics"):
        prepare_conversion(**separate)
    monkeypatch.setattr(calibration_space, "on_one_disk", lambda *_: False)
    prepare_conversion(**separate)


def test_statistics_that_are_there_take_no_space(base, text, tmp_path, monkeypatch):
    statistics = tmp_path / "statistics"
    convert(**arguments(base, tmp_path / "first", text, statistics=statistics))
    asked = []

    def answer(path):
        asked.append(path)
        return 0 if path == statistics else 2**40

    monkeypatch.setattr(calibration_space, "free_bytes", answer)
    convert(**arguments(base, tmp_path / "second", text, statistics=statistics))
    assert statistics in asked
