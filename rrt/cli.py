"""What every command shares: error reporting, exit codes and formatting of sizes."""

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from rrt.errors import UserError

EXIT_USER_ERROR = 2


def _raise_exit(signum: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run `main` as a command: bad input ends with one line on stderr and exit code 2.

    SIGTERM is turned into `SystemExit`, so that half-written output is cleaned up as on Ctrl-C.
    """
    signal.signal(signal.SIGTERM, _raise_exit)
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def human_count(count: float) -> str:
    """``1_984_000_000`` -> ``"1.98 B"`` (parameters, tokens)."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f}"


def human_bytes(count: float) -> str:
    """Bytes with a binary unit: ``5368709120`` -> ``"5.00 GiB"``."""
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"
