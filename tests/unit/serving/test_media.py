"""Images of requests: what is read, what is refused before it is decoded, and what is fetched from where."""

import io
import struct
import zlib

import httpx2
import pytest
from PIL import Image
from support.server_cases import data_uri

from internvl_jax.processing.images import ImageProcessor
from internvl_jax.serving.api.errors import ApiError
from internvl_jax.serving.api.media import ImageReader
from internvl_jax.serving.api.settings import ServerSettings

PROCESSOR = ImageProcessor(28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def make_reader(resolve=None, handler=None, **settings):
    transport = None if handler is None else httpx2.MockTransport(handler)
    return ImageReader(
        ServerSettings("m", **settings), PROCESSOR, resolve or (lambda host: ["93.184.215.14"]), transport
    )


def encoded(kind="PNG", size=(40, 30), **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, (10, 200, 90)).save(buffer, kind, **options)
    return buffer.getvalue()


def refused(code, url, reader=None, status=400):
    with pytest.raises(ApiError) as caught:
        (reader or make_reader())(url, "messages.0")
    assert (caught.value.code, caught.value.status, caught.value.param) == (code, status, "messages.0")
    assert "0x" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_images_are_read_and_scaled(kind):
    image = make_reader()(data_uri(encoded(kind), f"image/{kind.lower()}"), "x")
    assert image.size == (28, 28)
    assert image.mode == "RGB"


def test_orientation_is_applied():
    image = Image.new("RGB", (40, 40), "black")
    image.paste((255, 255, 255), (0, 0, 40, 20))  # white above
    exif = Image.Exif()
    exif[274] = 3  # upside down
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=95)
    read = make_reader()(data_uri(buffer.getvalue(), "image/jpeg"), "x")
    assert read.getpixel((14, 3))[0] < 60
    assert read.getpixel((14, 25))[0] > 200


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,%%%", "invalid_image_url"),
        ("data:image/png,abc", "invalid_image_url"),
        ("data:text/html;base64,AAAA", "invalid_image_url"),
        ("data:image/png;base64", "invalid_image_url"),
        ("data:image/png;base64,", "invalid_image"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("/etc/passwd", "invalid_image_url"),
        ("ftp://example.com/a.png", "invalid_image_url"),
        ("gopher:x", "invalid_image_url"),
        ("", "invalid_image_url"),
        ("https://example.com/a.png", "remote_images_disabled"),
    ],
)
def test_other_urls_are_refused(url, code):
    refused(code, url)


def png_of_size(width, height):
    """A PNG whose header gives a size, with next to no data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(8000, 8000), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_by_their_header(monkeypatch, size):
    decoded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: decoded.append(1))
    assert "50,000,000" in refused("image_too_large", data_uri(png_of_size(*size))).message
    assert not decoded


def test_animations_are_refused():
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        refused("image_animated", data_uri(buffer.getvalue(), f"image/{kind.lower()}"))


def test_other_formats_and_damaged_files_are_refused():
    """Formats whose decoders are rarely used are not tried; messages of decoders stay in the log."""
    for kind in ("TIFF", "ICO", "PPM", "JPEG2000", "TGA"):
        refused("invalid_image", data_uri(encoded(kind, (32, 32)), f"image/{kind.lower()}"))
    for data in (encoded()[:60], encoded("JPEG")[:200], b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a", b"\0"):
        refused("invalid_image", data_uri(data))


def test_a_model_without_vision_refuses_images():
    refused("images_not_supported", data_uri(encoded()), ImageReader(ServerSettings("m"), None))


# Remote images.

ALLOWED = {"allowed_media_domains": ("images.example.com",)}


def answer(request, content=None):
    data = encoded() if content is None else content
    return httpx2.Response(200, stream=httpx2.ByteStream(data))  # not read before the client does


def test_an_image_is_fetched_from_the_address_that_was_checked():
    asked = []

    def handler(request):
        asked.append(request)
        return answer(request)

    reader = make_reader(handler=handler, **ALLOWED)
    assert reader("https://images.example.com/a.png?b=c", "x").size == (28, 28)
    (request,) = asked
    assert str(request.url) == "https://93.184.215.14/a.png?b=c"
    assert request.headers["host"] == "images.example.com"
    assert request.extensions["sni_hostname"] == "images.example.com"
    assert reader("https://IMAGES.EXAMPLE.COM/a.png", "x").size == (28, 28)


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example/a.png",
        "https://images.example.com.evil.example/a.png",
        "https://evil.example/images.example.com",
        "https://evil.example#@images.example.com/",
        "https://evil.example?@images.example.com/",
        "https://images.example.com@evil.example/",
        "https://evil.example\\@images.example.com/",
        "https://images.example.com\\.evil.example/",
        "https://images.example.com%2eevil.example/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://2130706433/",
        "https:///a.png",
        "https://",
        "http://images.example.com/a.png",
        "https://images.example.com:8443/a.png",
        "https://user:password@images.example.com/a.png",
        "https://images.example.com\n.evil.example/",
    ],
)
def test_nothing_is_asked_of_other_hosts(url):
    def handler(request):
        raise AssertionError("a request was sent")

    with pytest.raises(ApiError) as caught:
        make_reader(handler=handler, **ALLOWED)(url, "x")
    assert caught.value.code in ("domain_not_allowed", "invalid_image_url")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "ff02::1",
    ],
)  # fmt: skip
def test_an_allowed_name_that_resolves_to_a_private_address_is_refused(address):
    def handler(request):
        raise AssertionError("a request was sent")

    for addresses in ([address], ["93.184.215.14", address]):
        reader = make_reader(lambda host, found=addresses: found, handler, **ALLOWED)
        error = refused("image_fetch_failed", "https://images.example.com/a.png", reader)
        assert address not in error.message


def test_redirects_are_not_followed():
    asked = []

    def handler(request):
        asked.append(str(request.url))
        return httpx2.Response(302, headers={"Location": "http://169.254.169.254/latest"})

    refused("image_fetch_failed", "https://images.example.com/a.png", make_reader(handler=handler, **ALLOWED))
    assert len(asked) == 1


def test_a_large_or_slow_image_is_given_up(monkeypatch):
    def handler(request):
        return answer(request, b"x" * 2000)

    reader = make_reader(handler=handler, max_fetch_bytes=1000, **ALLOWED)
    refused("image_fetch_failed", "https://images.example.com/a.png", reader)

    class Trickle(httpx2.SyncByteStream):
        def __iter__(self):
            for _ in range(1000):
                clock[0] += 1
                yield b"x"

    clock = [0.0]
    monkeypatch.setattr("internvl_jax.serving.api.media.time.monotonic", lambda: clock[0])
    reader = make_reader(handler=lambda request: httpx2.Response(200, stream=Trickle()), **ALLOWED)
    refused("image_fetch_failed", "https://images.example.com/a.png", reader)
    assert clock[0] < 10


def test_a_host_without_an_address_or_an_answer_is_an_error():
    def nowhere(host):
        raise OSError("no such host")

    def broken(request):
        raise httpx2.ConnectError("refused at 0x7f")

    refused("image_fetch_failed", "https://images.example.com/a.png", make_reader(nowhere, **ALLOWED))
    refused("image_fetch_failed", "https://images.example.com/a.png", make_reader(lambda host: [], **ALLOWED))
    refused("image_fetch_failed", "https://images.example.com/a.png", make_reader(handler=broken, **ALLOWED))
