"""Images of requests: data: URIs, and https URLs of hosts that the server's owner allows."""

from __future__ import annotations

import base64
import binascii
import io
import ipaddress
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx2
from PIL import Image

from internvl_jax.processing.images import ImageError, ImageProcessor, load_image
from internvl_jax.serving.api.errors import ApiError
from internvl_jax.serving.api.settings import ServerSettings

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # decoders that see bytes from clients; Pillow has 40 more

Resolve = Callable[[str], list[str]]


def resolve(host: str) -> list[str]:
    """All addresses of a host. Raises OSError where it has none."""
    return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)})


@dataclass(frozen=True)
class ImageReader:
    """Reads the image of a URL.

    Attributes:
        settings: limits.
        processor: the model's preprocessing; None: the model sees no images.
        resolve: resolves the names of hosts.
        transport: sends requests; None: over the network.
    """

    settings: ServerSettings
    processor: ImageProcessor | None
    resolve: Resolve = resolve
    transport: httpx2.BaseTransport | None = field(default=None, repr=False)

    def __call__(self, url: str, param: str) -> Image.Image:
        """Read an image.

        Args:
            url: where it is.
            param: the field that has the URL, for errors.

        Returns:
            The image, upright and scaled to the model's size, so that large ones are not held.

        Raises:
            ApiError: the image cannot be used.
        """
        if self.processor is None:
            raise ApiError(400, "this model sees no images", "images_not_supported", param)
        scheme = url.partition(":")[0].strip().lower()[:10]
        if scheme == "data":
            data = _decode_data_uri(url, param)
        elif scheme in ("http", "https"):
            data = self._fetch(url, param)
        else:
            raise ApiError(
                400, "an image is a data: URI, such as data:image/png;base64,...", "invalid_image_url", param
            )
        return self.processor.scaled(self._open(data, param))

    def _open(self, data: bytes, param: str) -> Image.Image:
        """Decode an image whose header shows that it is within the limits.

        Pillow's messages stay here: they name objects with their addresses.
        """
        limit = self.settings.max_image_pixels
        too_large = ApiError(400, f"the image has more than {limit:,} pixels: scale it down", "image_too_large", param)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > limit:
                    raise too_large
                # Of a JPEG with several images, such as a phone's with a preview, the first one counts.
                if getattr(image, "is_animated", False) and image.format != "MPO":
                    raise ApiError(400, "the image is animated: send one frame of it", "image_animated", param)
                return load_image(image, honor_exif=True, max_pixels=limit).copy()
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise too_large from None
        except ApiError:
            raise
        except Exception as error:  # decoders of damaged files raise anything
            logger.info("%s: the image cannot be read: %s", param, error)
            known = " or ".join([", ".join(FORMATS[:-1]), FORMATS[-1]])
            raise ApiError(
                400, f"the image is damaged, or in another format than {known}", "invalid_image", param
            ) from None

    # Remote images.

    def _fetch(self, url: str, param: str) -> bytes:
        """Fetch an image from an allowed host.

        One parser, httpx2.URL, reads the URL for the check and for the request. The request goes to the address that
        was checked, so a name cannot resolve to another one in between; redirects are not followed.
        """
        domains = self.settings.allowed_media_domains
        if not domains:
            message = "this server fetches no images: send a data: URI, such as data:image/png;base64,..."
            raise ApiError(400, message, "remote_images_disabled", param)
        try:
            target = httpx2.URL(url)
        except (httpx2.InvalidURL, ValueError):
            raise ApiError(400, "the image's URL is not valid", "invalid_image_url", param) from None
        if target.scheme != "https" or target.userinfo or target.port not in (None, 443):
            raise ApiError(400, "images are fetched by https, without a port or a user", "invalid_image_url", param)
        if target.host.lower() not in domains:
            raise ApiError(403, f"images are fetched from {', '.join(domains)} only", "domain_not_allowed", param)
        try:
            return self._download(target, self._checked_address(target.host))
        except (OSError, httpx2.HTTPError, ImageError) as error:
            logger.warning("%s: %s cannot be fetched: %s", param, target.host, error)
            raise ApiError(400, "the image could not be fetched", "image_fetch_failed", param) from None

    def _checked_address(self, host: str) -> str:
        addresses = self.resolve(host)
        for address in addresses:
            parsed = ipaddress.ip_address(address)
            parsed = getattr(parsed, "ipv4_mapped", None) or parsed
            if not parsed.is_global or parsed.is_multicast:
                raise OSError(f"{host} resolves to {address}, which is not public")
        if not addresses:
            raise OSError(f"{host} has no address")
        return addresses[0]

    def _download(self, target: httpx2.URL, address: str) -> bytes:
        deadline = time.monotonic() + self.settings.fetch_timeout
        limit, data = self.settings.max_fetch_bytes, bytearray()
        client = httpx2.Client(
            transport=self.transport, timeout=self.settings.fetch_timeout, follow_redirects=False, trust_env=False
        )
        with (
            client,
            client.stream(
                "GET",
                target.copy_with(host=address),
                headers={"Host": target.host, "Accept": "image/*", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": target.host},
            ) as response,
        ):
            if response.status_code != 200:
                raise OSError(f"status {response.status_code}")
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > limit:
                    raise OSError(f"more than {limit} bytes")
                if time.monotonic() > deadline:
                    raise OSError(f"more than {self.settings.fetch_timeout} seconds")
        return bytes(data)


def _decode_data_uri(url: str, param: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(400, "a data: URI of an image is data:image/TYPE;base64,DATA", "invalid_image_url", param)
    if not head.lower().startswith("data:image/"):
        raise ApiError(400, "the data: URI is not of an image", "invalid_image_url", param)
    try:
        return base64.b64decode(data.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "the data: URI is not valid base64", "invalid_image_url", param) from None
