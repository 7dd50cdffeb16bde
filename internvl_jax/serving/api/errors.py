"""Errors in OpenAI's form. What a client reads names no address, path or trace; the log has them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

logger = logging.getLogger(__name__)

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: what is wrong and what to do instead, for the client.
        code: OpenAI's code, or one in its manner.
        param: the field of the request that is at fault.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def busy(message: str, retry_after: float) -> ApiError:
    """The error of a full queue."""
    return ApiError(429, message, "queue_full", headers={"Retry-After": str(max(1, round(retry_after)))})


def unavailable(message: str) -> ApiError:
    """The error of a server that is starting or shutting down."""
    return ApiError(503, message, "unavailable", headers={"Retry-After": "5"})


def from_validation(error: ValidationError) -> ApiError:
    """The error of a body that does not fit the API. It names the first field at fault, and no values."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(found, key=lambda one: len(one["loc"]))  # the deepest: the others are of a union's other members
    path = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        message = f"{path} is not supported here: leave it out"
        return ApiError(400, message, "unknown_parameter", path)
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", "invalid_json")
    if first["type"] == "missing":
        return ApiError(400, f"{path} is required", "missing_required_parameter", path)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{path}: {message}" if path else message, "invalid_value", path or None)


def _path(location: Sequence[int | str]) -> str:
    """The field at fault, without the names that pydantic gives to members of unions."""
    names = [str(part) for part in location if "[" not in str(part) and part != "str"]
    return ".".join(name for name, before in zip(names, [None, *names]) if name != before)


def respond(error: ApiError) -> Response:
    """The response of an error."""
    return JSONResponse(error.body(), error.status, error.headers)


async def on_api_error(_: Request, error: Exception) -> Response:
    """Handler of ApiError."""
    assert isinstance(error, ApiError)
    return respond(error)


async def on_http_error(_: Request, error: Exception) -> Response:
    """Handler of the framework's own errors, such as 404."""
    assert isinstance(error, HTTPException)
    messages = {
        404: ("there is nothing at this address", "not_found"),
        405: ("this address has no such method", "method_not_allowed"),
        413: ("the body is too large", "body_too_large"),
    }
    message, code = messages.get(error.status_code, (f"HTTP error {error.status_code}", None))
    return respond(ApiError(error.status_code, message, code, headers=error.headers))


async def on_failure(_: Request, error: Exception) -> Response:
    """Handler of everything else; the framework then raises the error again, for the log."""
    return respond(ApiError(500, "an internal error; the server's log has the details", "internal_error"))
