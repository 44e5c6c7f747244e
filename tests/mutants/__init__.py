"""Deliberate bugs in the core, and the proof that its tests see them; see ``__main__``."""
