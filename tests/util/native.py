"""Markers of the operators' tests: which need the native library, and which `make test` runs again without or by it."""

import pytest

from rrt.ops import build_info

needs_native = pytest.mark.skipif(build_info().library is None, reason=f"no native library: {build_info().reason}")
