"""The one exception type for mistakes that a user can make, and correct."""


class UserError(Exception):
    """Bad input, told in one line: the file, the field, what was found, what was expected.

    Commands print it as ``error: <message>`` and exit with status 2 (see :mod:`rrt.common.cli`). Library
    callers may catch it; anything else that escapes is a bug of ours.
    """
