"""Behaviour of every command on bad input and signals."""

import os
import platform
import signal
import subprocess
import sys

import pytest

from rrt.common.cli import CommandParser, run_command
from rrt.errors import UserError


@pytest.fixture(autouse=True)
def own_handlers():
    """The test process's signal handlers are as before afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def outcome(main, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    return stop.value.code, capsys.readouterr().err


def test_success_exits_zero_and_says_nothing(capsys):
    assert outcome(lambda: None, capsys) == (0, "")


def test_user_errors_and_missing_files_are_one_line_and_exit_two(capsys, tmp_path):
    def bad_input():
        raise UserError("field 'x': found 1; expected 2")

    assert outcome(bad_input, capsys) == (2, "error: field 'x': found 1; expected 2\n")
    assert outcome(lambda: (tmp_path / "absent").read_text(), capsys) == (
        2,
        f"error: {tmp_path / 'absent'}: No such file or directory\n",
    )


def parser():
    made = CommandParser(prog="command")
    made.add_argument("--num-loops", "-n", type=int, required=True)
    made.add_argument("--share", type=float)
    made.add_argument("--init", choices=("stepwise", "average"))
    made.add_argument("--input", nargs="+")
    made.add_argument("--pair", nargs=2)
    made.add_argument("--overwrite", action="store_true")
    return made


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--num-loops two", "--num-loops/-n: found 'two'; expected a whole number"),
        ("-n 2 --share x=1", "--share: found 'x=1'; expected a number"),
        ("-n 2 --init averge", "--init: found 'averge'; expected one of stepwise, average"),
        ("-n 2 --input", "--input: found no value; expected at least one"),
        ("-n 2 --pair 1", "--pair: found fewer values; expected 2"),
        ("-n", "--num-loops/-n: found no value; expected one"),
        ("-n 2 --overwrite=yes", "--overwrite: found 'yes'; expected no value"),
        ("-n 2 --num-lops 3", "command line: found --num-lops 3; expected --num-loops"),
        ("-n 2 --init=average stray", "command line: found stray; expected no such argument"),
        (["-n", "2", ""], "command line: found ''; expected no such argument"),
        ("", "--num-loops/-n: missing; expected on the command line"),
        ("-n 2 --in average", "command line: ambiguous option: --in could match --init, --input"),
    ],
)
def test_a_bad_command_line_is_one_line_with_flag_found_and_expected(capsys, line, message):
    words = line.split() if isinstance(line, str) else line
    assert outcome(lambda: parser().parse_args(words), capsys) == (
        2,
        f"error: {message} (--help lists the flags)\n",
    )


def test_help_is_argparses_own(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--help"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("usage: command [-h] --num-loops")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_to_a_full_disk_is_one_line():
    code = "from rrt.common.cli import run_command; run_command(lambda: print('line\\n' * {}))"
    for count in (1, 100_000):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-c", code.format(count)], stdout=full, stderr=-1, text=True)
        assert (done.returncode, done.stderr) == (2, "error: standard output: no space left on the disk\n")


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: print(1 / 0))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("swallow", [False, True])
def test_a_signal_ends_the_command_even_where_a_library_turns_it_into_an_error(number, code, swallow, capsys):
    cleaned = []

    def main():
        try:
            os.kill(os.getpid(), number)
        except BaseException:
            if swallow:
                raise UserError("truncated file") from None
            raise
        finally:
            cleaned.append(True)

    assert outcome(main, capsys) == (code, "interrupted\n")
    assert cleaned


def test_an_ignored_interrupt_stays_ignored(capsys):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert outcome(lambda: os.kill(os.getpid(), signal.SIGINT), capsys) == (0, "")


CHURN = """
import resource
import torch
from rrt.common.cli import keep_freed_memory
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        kept = [torch.ones(50_000 + 1000 * i) for i in range(40)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(3)
left = faults(20)
keep_freed_memory()
faults(3)
print(left, faults(20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_that_is_freed_is_kept():
    left, kept = map(int, subprocess.run([sys.executable, "-c", CHURN], capture_output=True, check=True).stdout.split())
    # 11 MB in each of 20 rounds are 55,000 pages.
    assert kept < 500 < 10_000 < left


def test_a_reader_that_has_gone_ends_the_command_without_a_word():
    code = "from rrt.common.cli import run_command; run_command(lambda: print('line\\n' * 100_000))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == ("", 128 + signal.SIGPIPE)


def test_a_pipe_other_than_stdout_that_breaks_is_reported(capsys):
    def main():
        raise BrokenPipeError(32, "Broken pipe")

    assert outcome(main, capsys) == (2, "error: Broken pipe\n")
