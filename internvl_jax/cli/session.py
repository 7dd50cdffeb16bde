"""An interactive conversation, and the printing of answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from internvl_jax.cli import runner
from internvl_jax.processing.images import load_image, read_once
from internvl_jax.utils.progress import err, printable, status

COMMANDS = {
    "/image": "FILE   attach an image to the next question; repeat it for several",
    "/clear": "       forget the images and the conversation",
    "/help": "        show this text",
    "/quit": "        leave (also Ctrl-D); Ctrl-C stops an answer, not the program",
}
HELP = "\n".join(f"  {name} {text}" for name, text in COMMANDS.items()) + (
    "\n  //...         ask a question that begins with a slash"
    "\n  Alt-Enter begins a new line, Enter sends, Tab completes commands and file names"
)
CONTEXT_FULL = "the context is full: /clear begins a new conversation"

Reader = Callable[[str], str]


class Session:
    """Asks for questions and prints answers until the end of input.

    Args:
        chat: The model.
        settings: Keyword arguments of `Chat.chat`.
        advice: Called with a question and its number of images; returns a note for the user, or None.
        images: Images that go with the first question.
    """

    def __init__(
        self,
        chat: Any,
        settings: dict[str, Any],
        advice: Callable[[str, int], str | None] = lambda question, images: None,
        images: Sequence[Path | bytes] = (),
    ):
        self._chat = chat
        self._settings = settings
        self._advice = advice
        self._images = list(images)
        self._history: list[tuple[str, str]] = []
        self._answered = self._failed = 0

    def run(self) -> int:
        """Returns the exit code: 1 where a script's input brought errors and no answer, else 0."""
        terminal = sys.stdin.isatty()
        read = self._terminal_reader() if terminal else _read_line
        while True:
            try:
                line = read(self._prompt()).strip()
                if line and not self._handle(line):
                    break
            except EOFError:
                break
            except runner.Terminated:
                raise
            except KeyboardInterrupt:
                err.print("(Ctrl-D or /quit leaves)")
        return 1 if self._failed and not self._answered and not terminal else 0

    def _prompt(self) -> str:
        count = len(self._images)
        return f"[{count} image{'' if count == 1 else 's'}] > " if count else "> "

    def _terminal_reader(self) -> Reader:
        from internvl_jax.cli.terminal import Prompt  # prompt_toolkit, which a script does not need

        err.print(f"{self._chat.name}: type a question. /image FILE attaches an image, /help shows more.")
        if note := self._advice("", 0):
            err.print(note, style="dim")
        return Prompt(COMMANDS)

    def _handle(self, line: str) -> bool:
        """Run a command or ask a question. False: leave the session."""
        command, _, argument = line.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                return False
            if command == "/help":
                err.print(HELP)
            elif command == "/clear":
                self._images, self._history = [], []
                err.print("(a new conversation, without images)", style="dim")
            elif command == "/image":
                self._images.append(_image_of(argument))
            elif command.startswith("/") and not command.startswith("//"):
                err.print(f"there is no command {printable(command)}; a question may begin with //\n{HELP}")
            else:
                self._ask(line.removeprefix("/") if line.startswith("//") else line)
        except runner.Terminated:
            raise
        except KeyboardInterrupt:
            print(flush=True)
            err.print("(stopped; this answer is not part of the conversation)")
        except ValueError as error:
            self._failed += 1
            runner.print_error(str(error))
            if self._history and "context" in str(error):
                err.print(f"({CONTEXT_FULL})", style="dim")
        return True

    def _ask(self, question: str) -> None:
        reply = print_answer(self._chat, question, self._images, self._history, self._settings)
        self._history = reply.history
        self._answered += 1
        if note := self._advice(question, len(self._images)):
            err.print(note, style="dim")
        else:
            print_notes(self._chat, reply)


def print_answer(
    chat: Any,
    question: str,
    images: Sequence[Path | bytes],
    history: list[tuple[str, str]],
    settings: dict[str, Any],
) -> Any:
    """Print an answer, streamed where the settings allow it. Returns the Reply."""
    with status("answering (the first answer also compiles)") as waiting:
        if settings.get("num_beams", 1) > 1:  # beam search decides at the end
            reply = chat.chat(question, images, history, **settings)
            waiting.stop()
            print(_shown(reply.text), flush=True)
            return reply
        stream = chat.stream(question, images, history, **settings)
        shown = False
        try:
            for piece in stream:
                waiting.stop()
                shown = True
                print(_shown(piece), end="", flush=True)
        except ValueError:
            if shown:
                print(flush=True)
            raise
    print(flush=True)
    return stream.reply


def _shown(text: str) -> str:
    """Text for stdout: as it is in a file or a pipe, without raw control characters on a terminal."""
    return printable(text) if sys.stdout.isatty() else text


def print_notes(chat: Any, reply: Any) -> None:
    """Say on stderr why an answer is cut off or empty."""
    if reply.finish_reason == "length":
        used = reply.prompt_tokens + len(reply.tokens)
        if used >= chat.config.text.context:
            err.print(f"(cut off after {len(reply.tokens)} tokens: {CONTEXT_FULL})", style="dim")
        else:
            err.print(f"(cut off after {len(reply.tokens)} tokens: --max-new-tokens allows more)", style="dim")
    elif not reply.text:
        err.print("(the answer is empty)", style="dim")


def read_image(path: Path) -> Path | bytes:
    """An image that has been checked to be readable: its file, or the bytes that a pipe gave.

    Raises:
        ImageError: It is not an image.
    """
    image = read_once(path)
    load_image(image, honor_exif=False)
    return image


def read_stdin(read: Callable[[], str]) -> str:
    """Call `read`. Raises ValueError where standard input is closed (`<&-`)."""
    try:
        return read()
    except OSError as error:
        raise ValueError(f"standard input cannot be read ({error.strerror}): give the question as PROMPT") from None


def _image_of(argument: str) -> Path | bytes:
    name = argument.strip().strip("'\"")
    if not name:
        raise ValueError("/image needs a file: /image photo.jpg")
    return read_image(Path(name).expanduser())


def _read_line(_: str) -> str:
    line = read_stdin(sys.stdin.readline)
    if not line:
        raise EOFError
    return line
