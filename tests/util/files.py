"""Files and file systems in states that a program must tell the user of."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 98000000\n"
"""Content of a file that git-lfs has not fetched."""


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Have every write beyond `size` bytes of a file fail in this process, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
