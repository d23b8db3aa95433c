"""Continuous depth-wise batching: many requests in one stream of passes, each row at a loop of its own."""
