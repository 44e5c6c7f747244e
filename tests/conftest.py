"""Property tests that say nothing of their own try a hundred cases, as tests.properties says."""

from __future__ import annotations

from hypothesis import settings

from tests.properties import examples

settings.register_profile("headrace", examples(100))
settings.load_profile("headrace")
