"""The `chat` command: one question, or a session."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from internvl_jax.cli import options, runner
from internvl_jax.utils.progress import err, print_json, progress_bar, status

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")

Advice = Callable[[str, int], str | None]


def add_parser(commands: options.Commands) -> None:
    """Add `chat` to the commands."""
    parser = commands.add_parser(
        "chat",
        help="ask a question about images, or start a session",
        description="Answers PROMPT, about images if there are any. Without PROMPT it starts a session. Without "
        "--checkpoint it runs nano, a small model that ships with the project.",
        epilog="examples:\n"
        "  internvl-jax chat --image internvl_jax/nano/images/shapes.png 'How many shapes are there?'\n"
        "  internvl-jax chat --checkpoint InternVL-Chat-V1-1-jax --image a.jpg b.jpg 'What differs?'\n"
        "  internvl-jax chat --checkpoint InternVL-Chat-V1-1-jax",
    )
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="the question; '-' reads it from standard input")
    parser.set_defaults(more=[])
    parser.add_argument(
        "--image",
        action=_Images,
        nargs="+",
        default=[],
        metavar="FILE",
        help="images, in order; PROMPT may follow them (default: none)",
    )
    parser.add_argument(
        "--draw",
        type=options.path,
        metavar="FILE",
        help="write the image with the boxes of the answer to FILE; takes one image (default: none)",
    )
    options.add_json(parser)
    options.add_model(parser)
    options.add_generation(parser)
    options.add_processes(parser)
    parser.set_defaults(run=_run)


class _Images(argparse.Action):
    """Takes `--image a.png b.png "What is it?"` apart: after the first value, what names no image is the question."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        images, words = [*namespace.image], [*namespace.more]
        for number, value in enumerate(values):
            if number and not _names_an_image(value):
                words.append(value)
                continue
            try:
                images.append(options.path(value))
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentError(self, str(error)) from None
        namespace.image, namespace.more = images, words


def _names_an_image(word: str) -> bool:
    if len(word.split()) == 1 and Path(word).suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        found = options.path(word)
        return found.exists() and not found.is_dir()
    except (argparse.ArgumentTypeError, OSError):
        return False


def _run(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    if prompt is None and args.json:
        args.parser.error("--json prints one answer: give it a PROMPT")
    if args.draw is not None:
        _check_draw(args, prompt)

    from internvl_jax.cli import session
    from internvl_jax.inference.loading import load
    from internvl_jax.parallel.distributed import is_multi_process

    images = [session.read_image(path) for path in args.image]  # before the model is loaded for them
    settings = options.question_options(args)
    options.start_processes(args)
    if prompt is None and is_multi_process():
        args.parser.error("a session runs in one process: give a PROMPT, which all processes then answer")
    with progress_bar() as progress:
        chat = load(args.checkpoint, options.load_options(args), progress=progress)
    chat.check_ready()
    advice = _advice(args)
    if prompt is None:
        return session.Session(chat, settings, advice, images).run()
    processor = chat.processor
    if args.draw is not None and processor is not None and (processor.pad_to_square or processor.center_crop):
        runner.print_error("--draw needs a model that sees the whole image; this one pads or crops it")
        return 1
    reply = _answer_once(chat, prompt, images, settings, advice, as_json=args.json)
    if reply is None:
        return 1
    if args.draw is not None:
        _draw(chat, reply, images[0], args.draw, honor_exif=not args.ignore_exif)
    return 0


def _check_draw(args: argparse.Namespace, prompt: str | None) -> None:
    """Refuse what `--draw` cannot do, before the model is loaded."""
    from PIL import Image

    if prompt is None or len(args.image) != 1:
        args.parser.error("--draw needs a PROMPT about one --image")
    if args.draw.suffix.lower() not in Image.registered_extensions():
        args.parser.error(f"--draw {args.draw}: give it the ending of an image format, such as .png")
    if not args.draw.parent.is_dir():
        args.parser.error(f"--draw {args.draw}: there is no directory {args.draw.parent}")


def _draw(chat: Any, reply: Any, source: Any, file: Path, *, honor_exif: bool) -> None:
    """Write the image with the boxes of the answer, or say that there are none."""
    from PIL import Image

    from internvl_jax.processing.boxes import draw_boxes
    from internvl_jax.processing.images import load_image
    from internvl_jax.utils.files import replacing

    image = load_image(source, honor_exif=honor_exif)
    boxes = chat.boxes(reply, *image.size)
    if not boxes:
        err.print(f"(the answer has no boxes: {file} is not written)", style="dim")
        return
    with replacing(file) as temporary:
        draw_boxes(image, boxes).save(temporary, format=Image.registered_extensions()[file.suffix.lower()])


def _answer_once(
    chat: Any, prompt: str, images: Sequence[Any], settings: dict[str, Any], advice: Advice, *, as_json: bool
) -> Any:
    """Print the answer and return its Reply; None if there is none, which is then said."""
    from internvl_jax.cli import session
    from internvl_jax.inference.chat import AnswerError

    try:
        if as_json:
            with status("answering (the first answer also compiles)"):
                reply = chat.chat(prompt, images=images, **settings)
            print_json(reply.to_dict())
        else:
            reply = session.print_answer(chat, prompt, images, [], settings)
    except AnswerError as error:
        runner.print_error(str(error))
        return None
    if note := advice(prompt, len(images)):
        err.print(note, style="dim")
    elif not as_json:
        session.print_notes(chat, reply)
    return reply


def _advice(args: argparse.Namespace) -> Advice:
    """What to tell the user about a question: nano without adapters says which questions it cannot answer."""
    if args.checkpoint is not None or args.adapters is not None:
        return lambda question, images: None
    from internvl_jax.nano import questions

    return questions.advice


def _prompt(args: argparse.Namespace) -> str | None:
    """The question; None for a session."""
    words = [*args.prompt, *args.more]
    if not words:
        return None
    if not args.image and (images := [word for word in words if _names_an_image(word)]):
        args.parser.error(f"{images[0]} is an image, not a question: write --image {' '.join(images[:3])}")
    if len(words) > 1:
        args.parser.error(f"one PROMPT is expected, not {len(words)} ({', '.join(map(repr, words[:5]))}): quote it")
    from internvl_jax.cli import session

    prompt = session.read_stdin(sys.stdin.read).strip() if words[0] == "-" else words[0]
    if not prompt.strip():
        args.parser.error("the prompt is empty: ask a question, or leave PROMPT out to start a session")
    return prompt
