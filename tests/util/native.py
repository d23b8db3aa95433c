"""The marker of tests that need the native library."""

import pytest

from rrt.ops import build_info

needs_native = pytest.mark.skipif(build_info().library is None, reason=f"no native library: {build_info().reason}")
