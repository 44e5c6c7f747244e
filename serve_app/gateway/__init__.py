"""The HTTP edge: OpenAI wire contract, keys, errors, pure ASGI."""
