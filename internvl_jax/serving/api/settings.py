"""The server's settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """What the server accepts, and how long it waits.

    Attributes:
        model_name: the model's name in the API.
        api_keys: keys that clients may use; none: no key is needed.
        local_only: whether only requests to a loopback name are answered, so that no other site's page can reach a
            server without a key by a name that it resolves to 127.0.0.1.
        allowed_media_domains: hosts from which images are fetched; none: images come in data: URIs only.
        max_body_bytes: largest body of a request.
        max_images: images of a request.
        max_image_pixels: pixels of an image.
        max_choices: answers to one request (`n`).
        max_active: requests that are being read, prepared, queued or answered.
        request_timeout: seconds until an answer ends.
        body_timeout: seconds that a client has to send a body.
        send_timeout: seconds that a client has to read a part of a streamed answer.
        fetch_timeout: seconds that fetching an image may take.
        max_fetch_bytes: size of a fetched image.
        drain_timeout: seconds that running answers have at shutdown.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    local_only: bool = True
    allowed_media_domains: tuple[str, ...] = ()
    max_body_bytes: int = 32 << 20
    max_images: int = 16
    max_image_pixels: int = 50_000_000
    max_choices: int = 8
    max_active: int = 264
    request_timeout: float = 600.0
    body_timeout: float = 30.0
    send_timeout: float = 30.0
    fetch_timeout: float = 5.0
    max_fetch_bytes: int = 20 << 20
    drain_timeout: float = 60.0
