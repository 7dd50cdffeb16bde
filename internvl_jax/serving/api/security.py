"""API keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import Request

from internvl_jax.serving.api.errors import ApiError


class ApiKeys:
    """The keys of a server.

    Args:
        keys: the keys; none: no key is needed.
    """

    def __init__(self, keys: Sequence[str]):
        self._digests = [_digest(key) for key in keys]

    def check(self, request: Request) -> str:
        """Check a request's key in constant time.

        Args:
            request: the request, with the key as a bearer token.

        Returns:
            The salt of the key's caches, which keeps tenants apart; "" where no key is needed.

        Raises:
            ApiError: there is no key, or a wrong one.
        """
        if not self._digests:
            return ""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        # Every key is compared, so that the time says nothing about which one came close.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            raise ApiError(
                401,
                "an API key is needed: send it as 'Authorization: Bearer KEY'",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return hashlib.sha256(b"salt of the caches" + given).hexdigest()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
