"""Commands run in the test's own process, which need not import torch again."""

import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from rrt.common.cli import run_command


class Done(NamedTuple):
    """Result of a command, as of a process."""

    code: int
    out: str
    err: str


def run_main(
    main: Callable[[Sequence[str]], None],
    argv: Sequence[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Done:
    """Run the `main` of a command on `argv`, each as text, with errors and exit codes as `run_command` makes them."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([str(argument) for argument in argv]))
    captured = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return Done(stop.value.code, captured.out, captured.err)


def run_program(
    main: Callable[[], None],
    argv: Sequence[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Done:
    """Do the same with a `main` that takes `argv` from the process's command line."""

    def with_argv(texts: Sequence[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["program", *texts])
            main()

    return run_main(with_argv, argv, capsys, monkeypatch)
