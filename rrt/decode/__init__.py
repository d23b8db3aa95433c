"""Incremental decoding: paged cache, passes of the shared block over rows of any loops."""
