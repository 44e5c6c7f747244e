"""Engines behind one Protocol: vLLM in process, and the simulated engine."""
