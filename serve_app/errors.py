"""Every error a client can see, and how it looks on the wire.

    ApiError                      status  type                    code
     +- InvalidRequest             400    invalid_request_error   (given)
     |   +- ContextLengthExceeded  400    invalid_request_error   context_length_exceeded
     +- Unauthenticated            401    invalid_request_error   invalid_api_key
     +- Forbidden                  403    permission_error        permission_denied
     +- NotFound                   404    invalid_request_error   not_found
     |   +- ModelNotFound          404    invalid_request_error   model_not_found
     +- MethodNotAllowed           405    invalid_request_error   method_not_allowed
     +- RequestTimeout             408    invalid_request_error   request_timeout
     +- BodyTooLarge               413    invalid_request_error   request_too_large
     +- UnsupportedMediaType       415    invalid_request_error   unsupported_media_type
     +- RateLimited                429    rate_limit_error        rate_limit_exceeded
     |   +- InsufficientQuota      429    insufficient_quota       insufficient_quota
     +- EngineFailed               500    server_error            engine_error
     +- Unavailable                503    server_error            (given)
     +- DeadlineExceeded           504    server_error            deadline_exceeded

    ConfigError                   a configuration that cannot be served
    StoreUnavailable              the database cannot be reached
    JournalUnavailable            usage cannot be written down on this node

The body is OpenAI's: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import math

import orjson


class ApiError(Exception):
    """An answer that is not a completion. Raised at the edge only.

    ``retry_after_s`` becomes a ``retry-after`` header, rounded up to a whole second;
    ``should_retry`` becomes ``x-should-retry``, which the openai client obeys.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else type(self).code
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry

    def body(self) -> bytes:
        """Return OpenAI's error object as JSON."""
        return orjson.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def sse_event(self) -> bytes:
        """Return the error as the last event of a stream that has begun."""
        return b"data: " + self.body() + b"\n\n"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that belong to this error, lower-cased."""
        headers: list[tuple[bytes, bytes]] = []
        if self.retry_after_s is not None:
            seconds = max(1, math.ceil(self.retry_after_s))
            headers.append((b"retry-after", str(seconds).encode()))
        if self.should_retry is not None:
            headers.append((b"x-should-retry", b"true" if self.should_retry else b"false"))
        return headers


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unauthenticated(ApiError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(ApiError):
    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(ApiError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(ApiError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaType(ApiError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class RateLimited(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class InsufficientQuota(RateLimited):
    type = "insufficient_quota"
    code = "insufficient_quota"


class EngineFailed(ApiError):
    code = "engine_error"


class Unavailable(ApiError):
    status = 503
    code = "unavailable"


class DeadlineExceeded(ApiError):
    status = 504
    code = "deadline_exceeded"


class ConfigError(Exception):
    """A configuration that cannot be served; the message names the field and the fix."""


class StoreUnavailable(Exception):
    """The database cannot be reached or answered with an error; the message has no secret."""


class JournalUnavailable(Exception):
    """A journal has no room or cannot be written; the message says why."""
