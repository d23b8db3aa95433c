"""Incremental decoding: a paged cache, and passes of the shared block over rows at any loops."""
