"""Folding of L layers into K shared ones that run B times, and unrolling."""
