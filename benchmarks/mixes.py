"""Mixes of traffic that several benchmarks use."""

from __future__ import annotations

from serve_app.sim.workload import Lengths, Prefixes, RateShape, Traffic

BLOCK_TOKENS, SEGMENT_TOKENS = 16, 256
BLOCKS_PER_HASH = SEGMENT_TOKENS // BLOCK_TOKENS


def chat_rag_agent(
    chat_per_s: float, rag_per_s: float, agent_per_s: float, shape: RateShape | None = None
) -> tuple[Traffic, ...]:
    """Return chat, RAG over long passages, and an agent with one long preamble; a tenant each."""
    return (
        Traffic("chat", chat_per_s, ("chat",), shape=shape),
        Traffic(
            "rag",
            rag_per_s,
            ("rag",),
            prompts=Lengths(6_000, 0.5, 1_000, 16_000),
            outputs=Lengths(60, 0.5, 4, 300),
            shape=shape,
        ),
        Traffic(
            "agent",
            agent_per_s,
            ("agent",),
            prompts=Lengths(400, 0.5, 16, 2_000),
            outputs=Lengths(90, 0.6, 4, 600),
            prefixes=Prefixes(3, 8_192, SEGMENT_TOKENS),
            shape=shape,
        ),
    )
