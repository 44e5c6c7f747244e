"""Policies as plain synchronous Python: no I/O, no clock, no randomness of its own."""
