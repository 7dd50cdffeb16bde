"""The `serve` command."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from internvl_jax.cli import options
from internvl_jax.utils.progress import progress_bar

logger = logging.getLogger(__name__)

KEY_VARIABLE = "INTERNVL_JAX_API_KEYS"


def add_parser(commands: options.Commands) -> None:
    """Add `serve` to the commands."""
    parser = commands.add_parser(
        "serve",
        help="answer many people at once over HTTP: OpenAI's API, and a page to chat on",
        description="Serves a model to many people at once: OpenAI's API below /v1, a page to chat on at /, metrics at "
        "/metrics. Without --checkpoint it serves nano. SIGTERM lets running answers finish.",
        epilog="examples:\n"
        "  internvl-jax serve\n"
        "  internvl-jax serve --checkpoint InternVL-Chat-V1-1-jax --mesh tensor=8 --host 0.0.0.0 --api-key-file keys",
    )
    options.add_model(parser)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at; a public one needs an API key"
    )
    network.add_argument("--port", type=_port, default=8000, metavar="N", help="port to listen at; 0: any free one")
    network.add_argument(
        "--api-key-file",
        type=options.path,
        metavar="FILE",
        help=f"file with one API key per line (default: the variable {KEY_VARIABLE}, keys separated by commas)",
    )
    network.add_argument("--served-model-name", metavar="NAME", help="the model's name in the API (default: its own)")
    network.add_argument(
        "--allowed-media-domains",
        nargs="+",
        default=[],
        metavar="HOST",
        help="hosts from which images are fetched by https (default: none, images are sent as data: URIs)",
    )
    _add_sizes(parser)
    _add_limits(parser)
    parser.set_defaults(run=_run)


def _add_sizes(parser: options.Parser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--batch-size", type=options.count, default=8, metavar="N", help="answers that run at once")
    group.add_argument(
        "--slots",
        type=options.count,
        metavar="N",
        help="tokens of prompt and answer that each has room for (default: 2048, or the model's context)",
    )
    group.add_argument(
        "--chunk", type=options.count, default=256, metavar="N", help="tokens of a prompt that are read at once"
    )
    group.add_argument("--decode-steps", type=options.count, default=8, metavar="N", help="decode steps per dispatch")
    group.add_argument("--max-waiting", type=options.natural, default=256, metavar="N", help="requests that may wait")


def _add_limits(parser: options.Parser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument("--max-body", type=options.count, default=32, metavar="MIB", help="body of a request")
    group.add_argument("--max-images", type=options.natural, default=16, metavar="N", help="images of a request")
    group.add_argument(
        "--max-image-pixels", type=options.count, default=50_000_000, metavar="N", help="pixels of an image"
    )
    group.add_argument(
        "--request-timeout", type=options.seconds, default=600.0, metavar="S", help="seconds until an answer ends"
    )
    group.add_argument(
        "--drain-timeout",
        type=options.seconds,
        default=60.0,
        metavar="S",
        help="seconds that running answers have at shutdown",
    )


def _run(args: argparse.Namespace) -> int:
    from internvl_jax.inference.loading import load
    from internvl_jax.serving.api.server import Server, create_app, is_loopback
    from internvl_jax.serving.api.settings import ServerSettings
    from internvl_jax.serving.engine import Engine
    from internvl_jax.serving.settings import EngineSettings

    keys = _keys(args.api_key_file)
    if not keys and not is_loopback(args.host):
        args.parser.error(
            f"{args.host} can be reached from other machines: give --api-key-file or {KEY_VARIABLE}, or listen at "
            "127.0.0.1"
        )
    with progress_bar() as progress:
        chat = load(args.checkpoint, options.load_options(args), progress=progress)
    chat.check_ready()
    settings = ServerSettings(
        model_name=args.served_model_name or chat.name,
        api_keys=keys,
        local_only=not keys,
        allowed_media_domains=tuple(host.lower() for host in args.allowed_media_domains),
        max_body_bytes=args.max_body << 20,
        max_images=args.max_images,
        max_image_pixels=args.max_image_pixels,
        max_active=args.batch_size + args.max_waiting,
        request_timeout=args.request_timeout,
        drain_timeout=args.drain_timeout,
    )
    context = chat.config.required_text.max_position_embeddings
    slots = args.slots or min(2048, context - context % args.chunk)
    engine = Engine(
        chat,
        EngineSettings(
            rows=args.batch_size,
            slots=slots,
            chunk=args.chunk,
            steps=args.decode_steps,
            max_waiting=max(args.max_waiting, 1),
        ),
    )
    server = Server(create_app(chat, engine, settings, room=slots), args.host, args.port)
    server.run()
    return 1 if server.cut_off or server.failed or not server.started else 0


def _port(text: str) -> int:
    port = options.natural(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"must be at most 65535, not {text}")
    return port


def _keys(path: Path | None) -> tuple[str, ...]:
    """The API keys of a file, or of the environment.

    Raises:
        ValueError: the file cannot be read, or has no key.
    """
    if path is None:
        return tuple(filter(None, (key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(","))))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"{path} cannot be read ({reason}): write one API key per line") from None
    keys = tuple(filter(None, map(str.strip, text.splitlines())))
    if not keys:
        raise ValueError(f"{path} has no API key: write one per line")
    return keys
