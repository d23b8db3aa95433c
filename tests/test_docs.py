"""The documentation is true: its commands and flags exist, its links lead somewhere, its Python runs."""

import contextlib
import io
import itertools
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import rrt
from rrt.folding.conversion import convert
from rrt.model.config import LoraRanks, RecursiveConfig
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer
from train.recipe_table import read_rows

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "eval/tasks/README.md"]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def simple_commands(line: str) -> Iterator[list[str]]:
    """Words of each command of a line of shell, without operators between commands and without a comment."""
    lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", line), posix=True, punctuation_chars="|&")  # not of FILE#ROW
    lexer.whitespace_split, lexer.commenters = True, ""
    for is_operator, words in itertools.groupby(lexer, lambda word: set(word) <= set("|&")):
        if not is_operator:
            yield list(words)


def commands(text: str) -> list[list[str]]:
    """Words of every Python command in bash blocks and in code spans, from the script or module on."""
    lines = [line for block in code_blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|torchrun) [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
    found = []
    for line in lines:
        for words in simple_commands(line):
            if words[0] not in ("python", "torchrun"):
                continue
            start = next((i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("rrt.")), None)
            if start is not None:
                found.append(words[start:])
    return found


DOCUMENTED = {page: commands(page.read_text(encoding="utf-8")) for page in PAGES}
WITH_SUBCOMMANDS = ("rrt.tokenizer",)
SCRIPTS = sorted({words[0] for found in DOCUMENTED.values() for words in found})


@cache
def help_of(script: str, *subcommands: str) -> str:
    """The script's --help."""
    code, out, _ = run_script(script, *subcommands, "--help")
    assert code == 0, out
    return out


def run_script(script: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command that ends early, in this process: to start one each takes seconds."""
    before = sys.argv, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    out, err = io.StringIO(), io.StringIO()
    try:
        sys.argv = [script, *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            if script.startswith("rrt."):
                # runpy warns of modules that are there.
                names = (script, f"{script}.__main__")
                modules = {name: sys.modules.pop(name) for name in names if name in sys.modules}
                try:
                    runpy.run_module(script, run_name="__main__")
                finally:
                    sys.modules.update(modules)
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = before[0]
        for number, handler in before[1].items():
            signal.signal(number, handler)
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bad_flag_is_one_line_that_names_it_without_the_usage(script: str) -> None:
    subcommands = ("train",) if script in WITH_SUBCOMMANDS else ()
    code, out, err = run_script(script, *subcommands, "--no-such-flag")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and "--" in err and "usage" not in err


def test_commands_are_found_in_blocks_and_spans():
    block = "torchrun --nproc-per-node 2 train/a.py --x \\\n  f.toml#1 --y  # why\npip install y && pkill -f '( |$)'\n"
    text = f"```bash\n{block}```\nas `python -m rrt.b --z` does"
    assert commands(text) == [["train/a.py", "--x", "f.toml#1", "--y"], ["rrt.b", "--z"]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_documented_flags_exist(script: str) -> None:
    for page, found in DOCUMENTED.items():
        for name, *words in found:
            if name != script:
                continue
            flags = {word.split("=")[0] for word in words if word.startswith("--")}
            subcommand = words[:1] if script in WITH_SUBCOMMANDS else []
            unknown = {
                flag
                for flag in flags - {"--help"}
                if not re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(script, *subcommand))
            }
            assert not unknown, f"{page.name}: {script} has no {unknown}"


def test_documented_rows_exist() -> None:
    recipes = {word for found in DOCUMENTED.values() for words in found for word in words if ".toml#" in word}
    assert recipes
    for recipe in recipes:
        path, _, row = recipe.partition("#")
        assert row in (*read_rows(ROOT / path), "ROW"), recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target
    for path in re.findall(r"`((?:rrt|train|eval|bench|csrc|tests|runs|docs)/[\w./-]*)`", text):
        generated = path.startswith(("rrt/_", "runs/out", "bench/out"))
        assert generated or (ROOT / path).exists(), f"{page.name} names {path}"


def test_every_command_of_the_project_is_documented() -> None:
    mains = {
        name
        for folder in ("rrt", "train", "eval")
        for name in (str(path.relative_to(ROOT)) for path in sorted((ROOT / folder).glob("*.py")))
        if '__name__ == "__main__"' in (ROOT / name).read_text(encoding="utf-8")
    }
    shown = {name if name.endswith(".py") else name.replace(".", "/") + ".py" for name in SCRIPTS}
    assert mains <= shown


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith(("train/", "eval/", "runs/"))])
def test_help_begins_with_an_example(script: str) -> None:
    description = help_of(script).partition("\noptions:")[0]
    assert re.search(rf"(python|torchrun .*) {script} \S", description)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    base = make_hf_model(folder / "base", "llama", vocab_size=420)
    make_bpe_tokenizer(base, "gpt_neox")
    convert(base, folder / "relaxed", RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(2)))
    return folder / "relaxed"


def test_python_of_readme_runs(checkpoint: Path) -> None:
    (block,) = code_blocks(PAGES[0].read_text(encoding="utf-8"), "python")
    assert "models/gemma-b2-r512" in block and "2 << 30" in block
    names: dict[str, object] = {}
    exec(block.replace("models/gemma-b2-r512", str(checkpoint)).replace("2 << 30", "1 << 20"), names)
    logits, tokens = names["logits"], names["tokens"]
    assert isinstance(logits, torch.Tensor) and logits.shape[-1] == rrt.load_model(checkpoint).config.vocab_size
    assert isinstance(tokens, list) and len(tokens[0]) == 32


def test_python_of_operators_runs() -> None:
    blocks = code_blocks((ROOT / "docs/OPERATORS.md").read_text(encoding="utf-8"), "python")
    assert blocks
    for block in blocks:
        exec(block, {})
