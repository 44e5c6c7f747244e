"""What the process that vLLM's engine is forked from imports, once, while the replica does."""

from __future__ import annotations

import logging

try:
    import serve_app.engine.vllm_executor
    import serve_app.engine.vllm_scheduler  # noqa: F401
except Exception:
    # The engine would import it again and say what is wrong where it is heard.
    logging.getLogger("headrace.engine").debug("nothing preloaded", exc_info=True)
