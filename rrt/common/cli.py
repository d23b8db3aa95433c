"""Shared parts of all commands: their flags' errors, error reporting, exit codes and formatting of sizes."""

import argparse
import ctypes
import difflib
import errno
import os
import re
import select
import signal
import stat
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from rrt.errors import UserError

EXIT_USER_ERROR = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class CommandParser(argparse.ArgumentParser):
    """Parser of a command line whose errors are a `UserError` that names flag, found and expected.

    `run_command` prints it in one line, without the usage.
    """

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self._reword(message)} (--help lists the flags)")

    def _reword(self, message: str) -> str:
        """Put a message of argparse into this project's form; one that is not known stays as it is."""
        kinds = {"int": "a whole number", "float": "a number"}
        if match := re.fullmatch(r"argument (\S+): invalid (\w+) value: (.*)", message, re.DOTALL):
            flag, kind, found = match.groups()
            return f"{flag}: found {found}; expected {kinds.get(kind, kind)}"
        if match := re.fullmatch(r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", message, re.DOTALL):
            flag, found, choices = match.groups()
            return f"{flag}: found {found}; expected one of {choices.replace(chr(39), '')}"
        if match := re.fullmatch(r"argument (\S+): expected (.*) arguments?", message):
            flag, count = match.groups()
            return f"{flag}: found {'fewer values' if count.isdigit() else 'no value'}; expected {count}"
        if match := re.fullmatch(r"argument (\S+): ignored explicit argument (.*)", message, re.DOTALL):
            flag, found = match.groups()
            return f"{flag}: found {found}; expected no value"
        if match := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
            found = match.group(1)
            name = (found.split() or [""])[0].partition("=")[0]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            return f"command line: found {found.strip() or repr(found)}; expected {(close or ['no such argument'])[0]}"
        if match := re.fullmatch(r"the following arguments are required: (.*)", message):
            return f"{match.group(1)}: missing; expected on the command line"
        return f"command line: {message}"


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run `main` as a command: bad input ends with one line on stderr and exit code 2.

    SIGTERM and SIGHUP are turned into `SystemExit`, so that half-written output is cleaned up as on Ctrl-C.
    """
    received: list[int] = []

    def stop(signum: int, _frame: FrameType | None) -> NoReturn:
        received.append(signum)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)

    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(name, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    try:
        main()
        sys.stdout.flush()
    except BaseException as error:
        if received:
            # Checked first: an exception raised inside a native library may come out of it as an error of the
            # library's own (safetensors: ValueError).
            _fail("interrupted", 128 + received[0])
        if isinstance(error, UserError):
            _fail(f"error: {error}", EXIT_USER_ERROR)
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            # The reader of the output has gone, as `| head` does. Python must not flush into the pipe at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        if _is_full_stdout(error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _fail("error: standard output: no space left on the disk", EXIT_USER_ERROR)
        if isinstance(error, OSError) and (error.filename is not None or error.strerror is not None):
            place = f"{error.filename}: " if error.filename is not None else ""
            _fail(f"error: {place}{error.strerror or error}", EXIT_USER_ERROR)
        if isinstance(error, KeyboardInterrupt):
            _fail("interrupted", 128 + signal.SIGINT)
        raise
    sys.exit(0)


def keep_freed_memory() -> None:
    """Keep freed memory in the process, for commands that make tensors of the same sizes again and again on a CPU.

    Call it when the model is loaded. glibc returns large freed blocks, and the freed end of its heap, to the system,
    which clears each page anew: several percent of a small model's time. From now on tensors up to 32 MiB come from
    the heap, and up to 256 MiB at its end are kept. Other C libraries are unaffected.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**28)


def _reader_has_gone() -> bool:
    """Return whether stdout is a pipe that nobody reads; another pipe, as to a worker process, may have broken too."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # stdout is no file
        return False


def _is_full_stdout(error: BaseException) -> bool:
    """Return whether stdout is a file on a full disk: what writes to other files names them in its errors."""
    if not isinstance(error, OSError) or error.errno != errno.ENOSPC or error.filename is not None:
        return False
    try:
        kind = os.fstat(sys.stdout.fileno()).st_mode
        return stat.S_ISREG(kind) or (stat.S_ISCHR(kind) and not sys.stdout.isatty())
    except (OSError, ValueError):  # stdout is no file
        return False


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def human_count(count: float) -> str:
    """Format a count of parameters or tokens: ``1_984_000_000`` -> ``"1.98 B"``."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f}"


def human_bytes(count: float) -> str:
    """Format bytes with a binary unit: ``5368709120`` -> ``"5.00 GiB"``."""
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"
