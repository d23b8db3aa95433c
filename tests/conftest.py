"""Settings for all tests."""

from hypothesis import settings

# A deadline per example would be a timed assertion.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
